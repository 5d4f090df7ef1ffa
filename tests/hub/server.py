"""A Hub on the loopback interface, for tests with the real clients.

    with LoopbackHub({"hf_fake_alice": "alice"}) as hub:
        run_client("...", hub, home=tmp_path, token="hf_fake_alice")
        assert hub.files("alice/model")["README.md"].startswith(b"---")

It answers what the real Hub is known to answer. What it does not know it refuses with 501, and it verifies what it is
sent: it never reports a success that the real Hub would not.
"""

import os
import secrets
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import endpoints, repository, transport
from tests.hub.call import Call, Response, as_json, unauthenticated
from tests.hub.repository import Commit, Refused, Repository


ENDPOINTS = endpoints.ENDPOINTS + transport.ENDPOINTS
MEGABYTE = 2**20
FAKE = "fake"  # every token of a test says so
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
OFFLINE = ("TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE")


@dataclass(frozen=True)
class Request:
    """A request as it was received."""

    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case
    body: bytes


def require_loopback(environment: Mapping[str, str]) -> None:
    """Raise `RuntimeError` unless a client with this environment can only talk to loopback, with a fake token."""
    host = urlsplit(environment.get("HF_ENDPOINT", "")).hostname
    if host not in LOOPBACK:
        raise RuntimeError(f"HF_ENDPOINT must be on the loopback interface, not {environment.get('HF_ENDPOINT')!r}")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if FAKE not in environment.get(name, FAKE):
            raise RuntimeError(f"{name} holds a token that does not call itself {FAKE!r}")
    if not environment.get("HF_HOME") or environment.get("HF_TOKEN_PATH"):
        raise RuntimeError("HF_HOME must name a folder of the test, and HF_TOKEN_PATH must not be set")
    for name in ("token", "stored_tokens"):
        if (stored := Path(environment["HF_HOME"], name)).exists() and FAKE not in stored.read_text():
            raise RuntimeError(f"{stored} holds a token that does not call itself {FAKE!r}")


class LoopbackHub:
    """Users are named by their tokens, `{token: user name}`; the tokens in `read_only` may not write.

    Objects above `part_size` bytes are uploaded in parts; regular files may have up to `regular_limit` bytes.
    """

    def __init__(
        self,
        users: dict[str, str],
        *,
        read_only: frozenset[str] | set[str] = frozenset(),
        part_size: int = 64 * MEGABYTE,
        regular_limit: int = 10 * MEGABYTE,
        page_size: int = 1000,
    ):
        if strangers := [token for token in (*users, *read_only) if FAKE not in token or token not in users]:
            raise ValueError(f"tokens must contain {FAKE!r} and belong to a user: {strangers}")
        self.users, self.read_only = dict(users), frozenset(read_only)
        self.part_size, self.regular_limit, self.page_size = part_size, regular_limit, page_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.uploads: dict[str, transport.Upload] = {}
        self.secret = secrets.token_bytes(16)
        self.requests: list[Request] = []
        self.errors: list[str] = []  # tracebacks of the server's own faults
        self.lock = threading.RLock()
        self._cuts: dict[str, tuple[int, int]] = {}  # path of uploads or downloads -> bytes, times
        self._hooks: list[Callable[[], None]] = []

    def __enter__(self) -> "LoopbackHub":
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = Server(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Clients follow a redirect within the Hub's host themselves; to another host, as here, they drop the token.
        self.storage = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self.errors and kind is None:
            raise RuntimeError("The loopback Hub failed:\n" + "\n".join(self.errors))

    def environment(self, home: Path, token: str | None) -> dict[str, str]:
        """The whole environment of a client process that knows this Hub and nothing else."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING_FACE", "HUGGINGFACE"))
            and name.lower() not in PROXIES
            and name not in OFFLINE
        }
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)} | ({"HF_TOKEN": token} if token else {})
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return kept | settings | {"NO_PROXY": ",".join(sorted(LOOPBACK)), "no_proxy": ",".join(sorted(LOOPBACK))}

    def url(self, kind: str, name: str) -> str:
        return f"{self.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"

    # What a test looks at

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Path -> content."""
        files = repository.resolve(self.repositories[kind, repo_id], revision).files
        return {path: files[path].content for path in sorted(files)}

    def commits(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """Newest first."""
        return repository.history(self.repositories[kind, repo_id], revision)

    # What a test brings about

    def commit(self, repo_id: str, files: Mapping[str, bytes], *, summary: str = "Change", kind: str = "model") -> str:
        """Commit regular files to main as the owner, without a client; returns the id of the commit."""
        with self.lock:
            repo = self.repositories[kind, repo_id]
            operations = [repository.Add(path, content) for path, content in files.items()]
            return repository.commit(repo, operations, author=repo.owner, summary=summary).oid

    def delete(self, repo_id: str, path: str, *, kind: str = "model") -> str:
        """Delete a file on main as the owner, without a client; returns the id of the commit."""
        with self.lock:
            repo = self.repositories[kind, repo_id]
            return repository.commit(repo, [repository.Delete(path)], author=repo.owner, summary="Delete").oid

    def cut_upload_after(self, num_bytes: int, times: int = 1) -> None:
        """Close the connection of the next uploads that are longer than `num_bytes`, after that many bytes."""
        self._cuts["/uploads/"] = (num_bytes, times)

    def cut_download_after(self, num_bytes: int, times: int = 1) -> None:
        """The same for downloads of large files."""
        self._cuts["/downloads/"] = (num_bytes, times)

    def before_commit(self, function: Callable[[], None]) -> None:
        """Call `function` once, just before the next request for a commit is handled."""
        self._hooks.append(function)

    # What happens to a request

    def take_cut(self, path: str, size: int) -> int | None:
        """After how many bytes a transfer of `size` bytes is to be cut, if it is; counts as done."""
        with self.lock:
            for prefix, (num_bytes, times) in self._cuts.items():
                if path.startswith(prefix) and times and size > num_bytes:
                    self._cuts[prefix] = (num_bytes, times - 1)
                    return num_bytes
        return None

    def answer(self, request: Request) -> Response:
        """The response to a request; an error of the Hub becomes the response that clients expect of it."""
        try:
            return self._dispatch(request)
        except Refused as error:
            message = " ".join(error.message.split()).encode("latin-1", errors="replace").decode("latin-1")
            headers = {"X-Error-Message": message} | ({"X-Error-Code": error.code} if error.code else {})
            return as_json({"error": error.message}, error.status, headers | error.headers)
        except Exception:
            self.errors.append(traceback.format_exc())
            return as_json({"error": f"The loopback Hub failed:\n{self.errors[-1]}"}, 501)

    def _dispatch(self, request: Request) -> Response:
        path, _, query = request.path.partition("?")
        method = "GET" if request.method == "HEAD" else request.method
        routes = ((pattern.fullmatch(path), function) for verb, pattern, function in ENDPOINTS if verb == method)
        parts, function = next(((parts, function) for parts, function in routes if parts), (None, None))
        if parts is None:
            raise Refused(501, f"The loopback Hub does not implement {request.method} {path}")
        if function is endpoints.commit_files:
            while self._hooks:
                self._hooks.pop(0)()
        user, may_write = self._identify(request)
        call = Call(self, path, parse_qs(query), request.headers, request.body, user, may_write)
        with self.lock:
            return function(call, **{name: unquote(part) for name, part in parts.groupdict().items()})

    def _identify(self, request: Request) -> tuple[str | None, bool]:
        """The user, and whether the token may write."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not scheme:
            return None, False
        if scheme != "Bearer" or token not in self.users:
            raise unauthenticated("Invalid credentials in Authorization header")
        return self.users[token], token not in self.read_only


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may go away
            self.RequestHandlerClass.hub.errors.append(traceback.format_exc())


class Cut(Exception):
    """The connection is to be closed without an answer; holds the bytes read so far."""


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        cut = False
        try:
            body = self.read_body()
        except Cut as error:
            body, cut = error.args[0], True
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        self.hub.requests.append(request)
        if cut:
            self.close_connection = True
        else:
            self.send(self.hub.answer(request))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def read_body(self) -> bytes:
        """The body, sent whole or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            if self.command == "PUT" and (limit := self.hub.take_cut(self.path, length)) is not None:
                raise Cut(self.rfile.read(limit))
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if self.command == "PUT" and (limit := self.hub.take_cut(self.path, len(body))) is not None:
                raise Cut(body[:limit])
        while self.rfile.readline().strip():
            pass  # trailers
        return body

    def send(self, response: Response) -> None:
        self.send_response(response.status)
        self.send_header("X-Request-Id", f"Root={uuid.uuid4()}")
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.take_cut(self.path, len(response.body)) if self.command == "GET" else None
        self.wfile.write(response.body[:limit])
        self.close_connection = self.close_connection or limit is not None

    def log_message(self, *_) -> None:
        pass
