"""Checkpoints to another place while the run goes on, in order, and never at its cost."""

import fnmatch
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..redaction import environment_secrets, without_tokens
from ..reliability.agreement import any_rank
from ..reliability.checkpoints import (
    LATEST_NAME,
    MANIFEST_NAME,
    TRAINING_ARGS_NAME,
    checkpoint_step,
    manifest_state,
    manifests_required_after,
    read_latest,
    sync_folder,
    validate_checkpoint,
    write_latest,
)
from ..reliability.events import EventLog


COMPONENT = "background_upload"
CHUNK = 2**20  # bytes copied between two looks at the clock
POLL_SECONDS = 0.05

# What a repository on the Hub gets of a checkpoint. A pickle goes only if asked for, `training_args.bin`, which holds
# the Hub token in clear, never.
HUB_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json", "*.py"),
)
HUB_RESUME_FILES = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", "resume.json"),
    *("README.md", MANIFEST_NAME),
)
_TEXT = (".json", ".py", ".jinja", ".md", ".txt")


class UploadRefused(ValueError):
    """What must not be uploaded, however often it is tried; the message names the file and the remedy."""


class FolderTarget:
    """A directory: a mounted bucket, a network drive, a second disk. Everything goes there but `training_args.bin`.

    A checkpoint is copied under a hidden name, synced, checked against its manifest (or its own headers), and only
    then gets its name.

    Args:
        path: made if it does not exist.
        max_bytes_per_second: no more on average over each checkpoint; `None`: as fast as it goes.
    """

    resumable = True

    def __init__(self, path: str | Path, *, max_bytes_per_second: float | None = None):
        if max_bytes_per_second is not None and max_bytes_per_second <= 0:
            raise ValueError(f"max_bytes_per_second={max_bytes_per_second} must be positive; None is no limit.")
        self.path, self.max_bytes_per_second = Path(path), max_bytes_per_second

    def put(self, folder: Path) -> None:
        """Copy a checkpoint; one of the same name is replaced. Raises what the file system raises."""
        partial, replaced = self.path / f".{folder.name}.partial", self.path / f".{folder.name}.replaced"
        for leftover in (partial, replaced):  # of a kill
            shutil.rmtree(leftover, ignore_errors=True)
        start, copied = time.monotonic(), 0
        for path in [folder, *sorted(folder.rglob("*"))]:
            if path.is_symlink():
                raise UploadRefused(f"{path.name} of {folder.name} is a link. Replace it by the file.")
            copy = partial / path.relative_to(folder)
            if path.is_dir():
                copy.mkdir(parents=True)
            elif path.name != TRAINING_ARGS_NAME:
                copied = self._copy(path, copy, start, copied)
        if problems := validate_checkpoint(partial):
            raise OSError(f"The copy of {folder.name} in {self.path} is not whole: {'; '.join(problems[:3])}")
        for path in [*partial.rglob("*"), partial]:
            if path.is_dir():
                sync_folder(path)
        if (self.path / folder.name).exists():
            os.replace(self.path / folder.name, replaced)
        os.replace(partial, self.path / folder.name)
        sync_folder(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def point_to(self, name: str) -> None:
        """Make `name` the newest checkpoint for readers of this place."""
        write_latest(self.path, name)

    def _copy(self, source: Path, destination: Path, start: float, copied: int) -> int:
        with source.open("rb") as reading, destination.open("xb") as writing:
            while chunk := reading.read(CHUNK):
                writing.write(chunk)
                copied += len(chunk)
                if self.max_bytes_per_second is not None:
                    time.sleep(max(0.0, start + copied / self.max_bytes_per_second - time.monotonic()))
            writing.flush()
            os.fsync(writing.fileno())
        return copied

    def __str__(self) -> str:
        return str(self.path)


class HubTarget:
    """A model repository on the Hub: each checkpoint a folder of it, in one commit, then the file `latest`.

    What goes is an allow-list: weights, configuration, tokenizer, code. Optimizer, scheduler and random states are
    pickles and stay, unless `resume_state=True`. `training_args.bin` never goes. A text file that holds something like
    a token, the value of a secret environment variable, or the absolute path of the run or of the home refuses the
    upload.

    Args:
        repo_id: `ORG/NAME`; made if it does not exist.
        private: make it private; one that exists must be so already. `False` accepts either.
        revision: a branch, which must exist; by default `main`.
        resume_state: upload what resuming needs, too. Shards of FSDP and DeepSpeed do not go to the Hub.
        token_file: read anew at each upload, so that a token may be renewed while the run goes on; where it is `None`
            or unreadable, `HF_TOKEN` or the stored token of `hf auth login`, read anew, too.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        resume_state: bool = False,
        token_file: str | Path | None = None,
    ):
        if repo_id.count("/") != 1 or repo_id.startswith((".", "/")):
            raise ValueError(f"repo_id={repo_id!r} is not ORG/NAME. For a directory use FolderTarget(path).")
        self.repo_id, self.private, self.revision = repo_id, private, revision
        self.resumable, self.token_file = resume_state, token_file
        self._ready = False

    def put(self, folder: Path) -> None:
        """Upload a checkpoint in one commit. Raises what the client raises, or [`UploadRefused`]."""
        patterns = [*HUB_FILES, *(HUB_RESUME_FILES if self.resumable else ())]
        _refuse_secrets(folder, patterns)
        api = self._api()
        if not self._ready:
            api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
            if self.private and not api.model_info(self.repo_id).private:
                raise UploadRefused(
                    f"{self.repo_id} is public. Make it private in its settings, or pass private=False."
                )
            self._ready = True
        api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            path_in_repo=folder.name,
            allow_patterns=patterns,
            ignore_patterns=[TRAINING_ARGS_NAME, f"*/{TRAINING_ARGS_NAME}"],
            revision=self.revision,
            commit_message=f"Upload {folder.name}",
        )

    def point_to(self, name: str) -> None:
        """Make `name` the newest checkpoint for readers of the repository, in a commit of its own."""
        self._api().upload_file(
            repo_id=self.repo_id,
            path_or_fileobj=f"{name}\n".encode(),
            path_in_repo=LATEST_NAME,
            revision=self.revision,
            commit_message=f"Point to {name}",
        )

    def _api(self) -> HfApi:
        token = None
        if self.token_file is not None:
            try:
                token = Path(self.token_file).read_text(encoding="utf-8").strip()
            except OSError:
                pass  # being replaced at this moment
        return HfApi(token=token or get_token())

    def __str__(self) -> str:
        return self.repo_id


class BackgroundUploadCallback(TrainerCallback):
    """Upload every checkpoint by one worker thread, first in, first out.

    For each checkpoint, in this order (checkpoint upload of the SIGMA stack, arXiv 2512.13488, framework layer):

    1. its folder; where the run writes manifests, once it is committed, and not at all if it was refused;
    2. the tracker `latest` there, only if the tracker here still names this very checkpoint: readers never see one go
       back. Here it is the run's `latest` file, or without manifests the newest save;
    3. with `delete_local`, the local copies of checkpoints that were uploaded, but never the one that the tracker
       names, nor the best: the run needs those.

    Whatever fails is an event and is tried again after a pause that doubles; after the last try the local copy stays,
    an event of severity `"error"` says so, and the queue goes on. Training is never stopped by it. At its end the
    queue is drained. The thread dies with the process: what was queued then lies in the run folder only, and a resumed
    run uploads what it saves itself.

    Args:
        target: a [`HubTarget`] or a [`FolderTarget`]; a `Path` stands for the latter, a `str` for the former.
        delete_local: see 3. Needs a target that takes what resuming needs.
        retries: further tries after the first.
        backoff_seconds: pause before the first of them; doubles up to `max_backoff_seconds`.
        commit_seconds: how long to wait for the manifest of a checkpoint; then it is passed over with an event.
        drain_seconds: how long the end of training waits for the queue; `None`: until it is empty.
    """

    def __init__(
        self,
        target: HubTarget | FolderTarget | str | Path,
        *,
        delete_local: bool = False,
        retries: int = 5,
        backoff_seconds: float = 2.0,
        max_backoff_seconds: float = 300.0,
        commit_seconds: float = 600.0,
        drain_seconds: float | None = None,
    ):
        if isinstance(target, Path):
            target = FolderTarget(target)
        elif isinstance(target, str):
            target = HubTarget(target)
        if delete_local and not target.resumable:
            raise ValueError(
                "delete_local=True would delete the only copy of the optimizer's state, which does not go to "
                f"{target}. Pass HubTarget(..., resume_state=True), a FolderTarget, or delete_local=False."
            )
        self.target, self.delete_local = target, delete_local
        self.retries, self.backoff_seconds, self.max_backoff_seconds = retries, backoff_seconds, max_backoff_seconds
        self.commit_seconds, self.drain_seconds = commit_seconds, drain_seconds
        self._queue: queue.Queue[Path | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._due: Path | None = None
        self._newest = self._best = None
        self._uploaded: list[Path] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._log = EventLog(args.output_dir, rank=args.process_index)
        self._stop = threading.Event()

    def on_save(self, args, state, control, **kwargs):
        self._enqueue()
        any_rank(False, device=args.device)  # a barrier: from here on every rank has written its files
        if state.is_world_process_zero:
            self._due = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self._newest, self._best = self._due.name, state.best_model_checkpoint

    def _enqueue_what_is_due(self, args, state, control, **kwargs):
        # The first event after the save: every callback has put its files into the checkpoint by now.
        self._enqueue()

    on_step_begin = on_epoch_begin = on_epoch_end = on_log = on_evaluate = _enqueue_what_is_due

    def on_train_end(self, args, state, control, **kwargs):
        self._enqueue()
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(self.drain_seconds)
        if self._thread.is_alive():
            self._stop.set()
            message = f"Not everything was uploaded to {self.target} within drain_seconds={self.drain_seconds}: "
            message += (
                f"{max(0, self._queue.qsize() - 1)} checkpoints and the one under way are in {args.output_dir} only."
            )
            self._log.record(COMPONENT, "warning", step=state.global_step, message=message)
        self._thread = None

    def _enqueue(self) -> None:
        if self._due is None:
            return
        folder, self._due = self._due, None
        if self._thread is None:
            self._queue = queue.Queue()
            self._thread = threading.Thread(
                target=self._work, args=(self._queue, self._stop), name=COMPONENT, daemon=True
            )
            self._thread.start()
        self._queue.put(folder)

    # In the worker

    def _work(self, jobs: "queue.Queue[Path | None]", stop: threading.Event) -> None:
        while not stop.is_set() and (folder := jobs.get()) is not None:
            try:
                self._upload(folder)
            except Exception as error:  # the next checkpoint is a new chance
                self._tell("error", folder, f"{folder.name} was not uploaded to {self.target}: {error!r}")

    def _upload(self, folder: Path) -> None:
        if (reason := self._not_committed(folder)) is not None:
            return self._tell("warning", folder, f"{folder.name} is not uploaded: {reason}.", action="skip")
        if not self._persist(folder, lambda: self.target.put(folder)):
            return
        if self._tracker(folder) == folder.name:
            self._persist(folder, lambda: self.target.point_to(folder.name))
        self._uploaded.append(folder)
        if self.delete_local:
            self._delete_uploaded()

    def _not_committed(self, folder: Path) -> str | None:
        """Why a checkpoint is not to be uploaded; `None` once it may be."""
        deadline = time.monotonic() + self.commit_seconds
        while self._awaits_manifest(folder):
            if not folder.is_dir():
                break
            if manifest_state(folder) == "refused":
                return "it was refused when it was saved"
            if time.monotonic() > deadline or self._stop.wait(POLL_SECONDS):
                return f"it has no manifest after commit_seconds={self.commit_seconds}"
        return None if folder.is_dir() else "it was deleted meanwhile (save_total_limit)"

    def _awaits_manifest(self, folder: Path) -> bool:
        required_after = manifests_required_after(folder.parent)
        if required_after is None or checkpoint_step(folder) <= required_after:
            return False
        latest = read_latest(folder.parent)  # written after the manifest
        return (
            manifest_state(folder) != "committed"
            or latest is None
            or checkpoint_step(Path(latest)) < checkpoint_step(folder)
        )

    def _tracker(self, folder: Path) -> str | None:
        with_manifests = manifests_required_after(folder.parent) is not None
        return read_latest(folder.parent) if with_manifests else self._newest

    def _persist(self, folder: Path, action: Callable[[], None]) -> bool:
        """Try, and try again; whether it was done in the end."""
        for attempt in range(self.retries + 1):
            try:
                action()
                return True
            except UploadRefused as error:
                self._tell("error", folder, f"{folder.name} is not uploaded: {error}")
                return False
            except Exception as error:
                if not folder.is_dir():
                    message = f"{folder.name} was deleted before it was uploaded (save_total_limit)."
                    self._tell("warning", folder, message, action="skip")
                    return False
                pause = min(self.backoff_seconds * 2**attempt, self.max_backoff_seconds)
                said = " ".join(f"{type(error).__name__}: {error}".split())
                if attempt < self.retries:
                    message = f"Uploading {folder.name} to {self.target} failed; again in {pause:g} s ({said})."
                    self._tell("warning", folder, message, action="retry", evidence={"attempt": attempt + 1})
                    if not self._stop.wait(pause):
                        continue
                message = f"{folder.name} was not uploaded to {self.target} in {attempt + 1} tries; it stays here. "
                self._tell("error", folder, message + f"Mend it and copy it by hand ({said}).")
                return False
        return False

    def _delete_uploaded(self) -> None:
        for folder in list(self._uploaded):
            best = self._best is not None and Path(self._best).absolute() == folder.absolute()
            if not best and self._tracker(folder) not in (folder.name, None):
                (folder / MANIFEST_NAME).unlink(missing_ok=True)  # first: what is half deleted must not look committed
                shutil.rmtree(folder, ignore_errors=True)
                self._uploaded.remove(folder)

    def _tell(self, severity: str, folder: Path, message: str, **fields) -> None:
        self._log.record(COMPONENT, severity, step=checkpoint_step(folder), message=without_tokens(message), **fields)


def _refuse_secrets(folder: Path, patterns: list[str]) -> None:
    """Raise [`UploadRefused`] for links, and for what must not be read elsewhere in a text file that would go."""
    roots = {str(folder.parent.absolute()), str(folder.parent.resolve()), str(Path.home())} - {"/"}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UploadRefused(f"{path.name} of {folder.name} is a link. Replace it by the file.")
        if path.suffix not in _TEXT or not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if without_tokens(text) != text or any(secret in text for secret in environment_secrets()):
            raise UploadRefused(f"{path.name} of {folder.name} holds a token or another secret. Remove it there.")
        if any(f"{root}{end}" in text for root in roots for end in ("/", '"')):
            raise UploadRefused(
                f"{path.name} of {folder.name} holds an absolute path of this machine. Start with a relative "
                "output_dir, and load models by their Hub id or a relative path."
            )


__all__ = ["HUB_FILES", "BackgroundUploadCallback", "FolderTarget", "HubTarget", "UploadRefused"]
