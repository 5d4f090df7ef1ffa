import shutil

import pytest

from trainers.data import corpus_fingerprint, load_text_dataset
from trainers.data.libreoffice import page_text, read_libreoffice_help


PAGE = """<header><p dir="auto">navigation</p></header>
<h1 id="hd_1" dir="auto">Database &amp; functions</h1>
<p id="par_1" class="paragraph" dir="auto"><a name="x"></a>Twelve <span class="emph">functions</span>
   help.</p><p id="par_2"> </p>"""


def test_page_text():
    assert page_text(PAGE) == "Database & functions\nTwelve functions help."


def test_unknown_language(tmp_path):
    with pytest.raises(ValueError, match="unknown language xx; choose from ca, cs"):
        load_text_dataset("libreoffice-help:de,xx", cache_dir=tmp_path)


def test_missing_tools_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="apt-get and dpkg cannot be found.*python-stdlib"):
        read_libreoffice_help(["de"], cache_dir=tmp_path)


def test_unreachable_index_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for tool in ("apt-get", "dpkg"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}", prepend=":")
    with pytest.raises(RuntimeError, match="Unable to locate package.*apt-get update"):
        read_libreoffice_help(["de"], cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "libreoffice-help").iterdir())


@pytest.mark.slow
def test_real_pages(tmp_path):
    try:
        splits = load_text_dataset("libreoffice-help:de,ja", cache_dir=tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    pages = [{source.split("/", 1)[1] for source in splits[split]["source"]} for split in ("train", "validation")]
    assert len(pages[0] | pages[1]) > 2000 and not pages[0] & pages[1]
    fingerprint = corpus_fingerprint(splits)

    (damaged,) = tmp_path.glob("*/de.jsonl")
    damaged.write_text("")
    assert corpus_fingerprint(load_text_dataset("libreoffice-help:de,ja", cache_dir=tmp_path)) == fingerprint
