"""One call of the Hub: what the endpoints are given, and what they return."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

from tests.hub.repository import Refused, Repository


if TYPE_CHECKING:
    from tests.hub.server import LoopbackHub


class Response(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    )


@dataclass
class Call:
    hub: "LoopbackHub"
    path: str  # as received, still quoted, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes
    user: str | None
    may_write: bool

    def json(self) -> dict:
        try:
            value = json.loads(self.body)
        except ValueError as error:
            raise Refused(400, f"The body is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise Refused(400, "The body is no JSON object")
        return value

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")

    def only_knows(self, *names: str) -> None:
        """Refuse parameters whose effect on the answer is not implemented."""
        if strangers := sorted(set(self.query) - {*names, "cursor", "limit"}):
            raise Refused(501, f"The loopback Hub does not implement the parameters {strangers} of {self.path}")

    def readable(self, kind: str, name: str) -> Repository:
        """The repository; those that the caller may not see do not exist."""
        if new_name := self.hub.moved.get((kind, name)):
            location = self.path.replace(f"/{name}", f"/{new_name}", 1)
            query = f"?{urlencode(self.query, doseq=True)}" if self.query else ""
            raise Refused(307, f"Moved to {new_name}", Location=location + query)
        repo = self.hub.repositories.get((kind, name))
        if repo is None or (repo.private and self.user != repo.owner):
            if self.user is None:
                # The Hub sends no code with this; clients know what it means by its `https:` address.
                raise unauthenticated(code="RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def contributor(self) -> str:
        """The user, whose token must be allowed to write."""
        if self.user is None:
            raise unauthenticated()
        if not self.may_write:
            raise Refused(403, "Your token does not have the permission to write")
        return self.user

    def writable(self, kind: str, name: str) -> Repository:
        """The repository, which must belong to the caller."""
        repo = self.readable(kind, name)
        if self.contributor() != repo.owner:
            raise Refused(403, f"You don't have the rights to write to the {kind} {name}")
        return repo

    def page(self, items: list) -> Response:
        """A page of the items, and the link to the next."""
        start, size = int(self.query.get("cursor", ["0"])[-1]), self.hub.page_size
        if "limit" in self.query:
            size = min(size, int(self.query["limit"][-1]))
        headers = {}
        if start + size < len(items):
            query = urlencode({**self.query, "cursor": start + size}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}{self.path}?{query}>; rel="next"'
        return as_json(items[start : start + size], headers=headers)


def unauthenticated(message: str = "Invalid username or password.", code: str | None = None) -> Refused:
    return Refused(401, message, code, WWW_Authenticate='Bearer realm="Authentication required", charset="UTF-8"')
