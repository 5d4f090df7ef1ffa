"""A run folder to the Hub, in one commit: weights, code, tokenizer, results, figures and the card.

    python -m model_cards.publish RUN --repo-id ORG/NAME [--private] [--replace] [--dry-run]

What goes is decided by `model_cards.publishable`; the run folder is only read. The token is that of `hf auth login` or
`HF_TOKEN`: there is no option for it, since a command line is seen by every process and kept in the shell's history.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from model_cards.build import CardError
from model_cards.compatibility import CompatibilityError
from model_cards.publishable import MANIFEST_NAME, Publication, PublishError, collect, published_before
from trainers.report import ResultsError


# What a repository that was made on the website has before anything was published.
FRESH = {".gitattributes", "README.md"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """`commit` is the head of the repository afterwards; `changed` is False where it was so before; `deleted` are the
    files of an earlier publication that this one does not have."""

    repo_id: str
    url: str
    commit: str
    changed: bool
    deleted: list[str]


def publish(run: str | Path, repo_id: str, *, private: bool = False, replace: bool = False) -> Published:
    """Publish the run folder `run` as `repo_id` in one commit on `main`; the same again is no commit.

    A repository that does not exist is made. One that holds an earlier run of the same architecture gets the new
    files, the card included, and loses those that an earlier publication put there and the new run does not have;
    files that the owner added stay.

    Args:
        private (`bool`): the repository is to be private. It must be so already if it exists: making a public
            repository private, or the reverse, is left to its owner.
        replace (`bool`): publish also into a repository that holds something else.

    Raises:
        PublishError: the run is not fit, or the Hub refused; nothing is half-published.
        ResultsError, CardError: see `model_cards.publishable.collect`.
    """
    _check_id(repo_id)
    publication = collect(run, repo_id)
    api = HfApi()
    with _remedies(repo_id):
        api.whoami()  # a token that is no good is told now, not as a repository that is not there
        before = _existing(api, repo_id)
        if before is None:
            # None, not False: where an organisation has private repositories by default, that holds.
            api.create_repo(repo_id, private=private or None)
            before = api.model_info(repo_id)
        else:
            _check_existing(api, before, publication, private=private, replace=replace)
        stale = _stale(api, before, publication)
        publication.check_unchanged()
        commit = api.create_commit(
            repo_id,
            operations=_operations(publication, stale),
            commit_message=f"Publish {publication.model_type}",
            # A push of someone else in between would be mixed with this one.
            parent_commit=before.sha,
        )
        missing = publication.sizes().keys() - set(api.list_repo_files(repo_id, revision=commit.oid))
    if missing:
        raise PublishError(
            f"{repo_id} has a .gitignore that kept out {sorted(missing)}, so that it cannot be loaded as it is: "
            "delete that file there, then run the command again."
        )
    return Published(
        repo_id=repo_id,
        url=f"{api.endpoint}/{repo_id}",
        commit=commit.oid,
        changed=commit.oid != before.sha,
        deleted=stale,
    )


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"--repo-id {repo_id!r} is not a Hub id: {error}") from error
    if "/" not in repo_id:
        raise PublishError(f"--repo-id {repo_id!r} names no owner: give ORG/NAME or USER/NAME.")


def _existing(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _check_existing(api: HfApi, info: ModelInfo, publication: Publication, *, private: bool, replace: bool) -> None:
    if private and not info.private:
        raise PublishError(
            f"{info.id} exists and is public, so --private cannot be kept. Make it private in its settings, or choose "
            "another --repo-id."
        )
    names = {sibling.rfilename for sibling in info.siblings or []} - FRESH
    if not names or replace:
        return
    try:
        config = json.loads(Path(api.hf_hub_download(info.id, "config.json", revision=info.sha)).read_text())
        held = f"a model of type {config['model_type']!r}"
    except LocalEntryNotFoundError:
        raise  # the Hub did not answer, which says nothing about what it holds
    except (EntryNotFoundError, ValueError, KeyError, TypeError):
        held = f"{len(names)} files that are no model"
    if held != f"a model of type {publication.model_type!r}":
        raise PublishError(
            f"The name {info.id} is taken: it holds {held}. Choose another --repo-id, or give --replace to publish "
            "there all the same."
        )


def _stale(api: HfApi, before: ModelInfo, publication: Publication) -> list[str]:
    names = {sibling.rfilename for sibling in before.siblings or []}
    if MANIFEST_NAME not in names:
        return []
    manifest = Path(api.hf_hub_download(before.id, MANIFEST_NAME, revision=before.sha)).read_bytes()
    return sorted((published_before(manifest) & names) - publication.sizes().keys())


def _operations(publication: Publication, stale: list[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    sources = publication.contents | {name: str(path) for name, path in publication.weights.items()}
    return [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=sources[name]) for name in sorted(sources)),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]


@contextmanager
def _remedies(repo_id: str) -> Iterator[None]:
    """What can go wrong between here and the Hub, in words that say what to do."""
    try:
        yield
    except Exception as error:
        # The client wraps what happens to a large file while it is uploaded.
        cause = error.__cause__ if type(error) is RuntimeError else error
        remedy = _remedy(cause, repo_id)
        if remedy is None:
            raise
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise PublishError(f"{remedy} ({said})") from error


def _remedy(error: BaseException | None, repo_id: str) -> str | None:
    again = "run the same command again; what the Hub has by now is not sent twice."
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token of the Hub here: run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be published: unset it."
    if isinstance(error, HfHubHTTPError):
        return {
            400: "The Hub refuses a file, most likely the metadata of the card.",
            401: "The Hub does not know this token: run `hf auth login`, or set HF_TOKEN to a token that may write.",
            403: f"This token may not write to {repo_id}: take one of your own, or a token with write access.",
            404: f"{repo_id} is not there, or not for this token.",
            409: f"The name {repo_id} is taken by a repository that this token cannot see: choose another --repo-id.",
            412: f"Someone else published to {repo_id} at the same moment: look at it, then run the command again.",
        }.get(error.response.status_code, f"The Hub refused: {again}")
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return f"The connection to the Hub broke: {again}"
    return None


def _describe(publication: Publication) -> str:
    sizes = publication.sizes()
    width = max(map(len, sizes))
    lines = [f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, in one commit:"]
    lines += [f"  {name:<{width}}  {size:>14,}" for name, size in sizes.items()]
    if publication.left_here:
        lines.append(f"stay here: {', '.join(publication.left_here)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 for a run or a Hub that refuses, 2 for what cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.publish", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository on the Hub; made if absent")
    parser.add_argument("--private", action="store_true", help="only you, or your organisation, may see it")
    parser.add_argument("--replace", action="store_true", help="also where the repository holds something else")
    parser.add_argument("--dry-run", action="store_true", help="check and list what would go; asks the Hub nothing")
    arguments = parser.parse_args(argv)
    try:
        if arguments.dry_run:
            _check_id(arguments.repo_id)
            print(_describe(collect(arguments.run, arguments.repo_id)))
            return 0
        done = publish(arguments.run, arguments.repo_id, private=arguments.private, replace=arguments.replace)
    except (PublishError, CardError, CompatibilityError, ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ResultsError, OSError)) else 1
    print(f"{done.url} {'published' if done.changed else 'was so already'}, commit {done.commit}")
    if done.deleted:
        print(f"deleted there, as the run does not have them: {', '.join(done.deleted)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
