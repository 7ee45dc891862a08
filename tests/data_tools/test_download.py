"""What is fetched can be prepared, and without a network the message says how to go on."""

import hashlib
import sys
from pathlib import Path

import download
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import read_records


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command; return its exit code and what it said."""

    def run(what: str, folder: Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["download.py", what, "-o", str(folder)])
        return download.main(), *capsys.readouterr()

    return run


def no_hub(*_: object, **__: object) -> str:
    raise ConnectionError("no route\nto the hub")


def test_the_demo_comes_out_of_gensim(fetch, tmp_path: Path):
    pytest.importorskip("gensim")
    code, out, _ = fetch("demo", tmp_path / "raw")
    assert code == 0
    path = tmp_path / "raw/enwiki-sample.xml.bz2"
    assert str(path) in out
    with path.open("rb") as raw:
        assert "Anarchism" in str(next(read_records(raw, text_field="text")).raw)


def test_without_gensim_the_demo_says_what_to_install(fetch, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(download, "find_spec", lambda _: None)
    code, _, err = fetch("demo", tmp_path)
    assert code == 2
    assert "pip install gensim" in err


ARTICLES = {
    "train": [" = One = \n", "", " Text . \n", "", " = = Part = = \n", " More . \n"],
    "validation": [" = Three = \n", "", " x \n"],
    "test": [" = Four = \n"],
}


def write_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files, as far as the command can know."""
    folder.mkdir(parents=True)
    for files in download.WIKITEXT_FILES.values():
        for part, file in enumerate(files):
            rows = ARTICLES[file.split("-")[0]]
            half = rows if len(files) == 1 else (rows[:3], rows[3:])[part]
            pq.write_table(pa.table({"text": pa.array(half, pa.string())}), folder / file)
            sha256 = hashlib.sha256((folder / file).read_bytes()).hexdigest()
            monkeypatch.setitem(files, file, sha256)


def test_wikitext_becomes_text_again(fetch, tmp_path: Path, monkeypatch):
    def snapshot_download(repo: str, *, repo_type: str, allow_patterns: str) -> Path:
        assert (repo, repo_type) == ("Salesforce/wikitext", "dataset")
        assert allow_patterns == "wikitext-103-raw-v1/*.parquet"
        write_parquet(tmp_path / "cache/wikitext-103-raw-v1", monkeypatch)
        return tmp_path / "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    raw = tmp_path / "raw"
    code, out, _ = fetch("wikitext-103", raw)
    assert code == 0
    assert f"-i {raw}/wiki.train.raw --valid_input {raw}/wiki.valid.raw" in out
    expected = " = One = \n\n Text . \n\n = = Part = = \n More . \n"
    assert (raw / "wiki.train.raw").read_text() == expected
    assert (raw / "wiki.valid.raw").read_text() == " = Three = \n\n x \n"
    names = {path.name for path in raw.iterdir()}
    assert names == {"wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"}


def test_without_a_hub_wikitext_can_be_placed_by_hand(fetch, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    code, _, err = fetch("wikitext-103", tmp_path / "raw")
    assert code == 2
    assert len(err.splitlines()) == 1
    place = tmp_path / "wikitext-103-raw-v1"
    assert f"put it in {place}, then give the same command again" in err
    write_parquet(place, monkeypatch)
    assert fetch("wikitext-103", tmp_path / "raw")[0] == 0


@pytest.mark.parametrize("what", ["missing", "another", "cut short"])
def test_wikitext_is_made_of_the_published_files_alone(fetch, tmp_path: Path, monkeypatch, what):
    write_parquet(tmp_path / "wikitext-103-raw-v1", monkeypatch)
    path = tmp_path / "wikitext-103-raw-v1/train-00001-of-00002.parquet"
    if what == "missing":
        path.unlink()
    elif what == "another":
        pq.write_table(pa.table({"text": ["mine"]}), path)
    else:
        path.write_bytes(path.read_bytes()[:-10])
    code, _, err = fetch("wikitext-103", tmp_path / "raw")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "train-00001-of-00002.parquet" in err
    assert list((tmp_path / "raw").iterdir()) == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The vocabulary on the hub, which downloads come from."""
    path = tmp_path / "hub/spm.model"
    path.parent.mkdir()
    path.write_text("public")

    def hf_hub_download(repo: str, name: str) -> str:
        assert (repo, name) == ("microsoft/deberta-v3-base", "spm.model")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(download, "VOCABULARY_SHA256", hashlib.sha256(b"public").hexdigest())
    return path


def test_the_public_vocabulary_is_fetched_under_a_name_of_its_own(fetch, tmp_path: Path, hub: Path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/spm.model").write_text("mine")
    code, out, _ = fetch("spm", tmp_path / "raw")
    assert code == 0
    path = tmp_path / "raw/deberta_v3.spm.model"
    assert str(path) in out
    assert path.read_text() == "public"
    assert (tmp_path / "raw/spm.model").read_text() == "mine"
    hub.unlink()
    assert fetch("spm", tmp_path / "raw")[0] == 0  # it is there


@pytest.mark.parametrize("where", ["on the hub", "in the folder"])
def test_another_vocabulary_is_refused(fetch, tmp_path: Path, hub: Path, where: str):
    path = tmp_path / "raw/deberta_v3.spm.model"
    path.parent.mkdir()
    if where == "in the folder":
        path.write_text("mine")
    else:
        hub.write_text("cut short")
    code, _, err = fetch("spm", path.parent)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"{path if where == 'in the folder' else hub} must be microsoft/deberta-v3-base" in err
    assert path.exists() == (where == "in the folder")


def test_without_a_hub_the_vocabulary_can_be_placed_by_hand(fetch, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_hub)
    code, _, err = fetch("spm", tmp_path)
    assert code == 2
    assert len(err.splitlines()) == 1
    path = tmp_path / "deberta_v3.spm.model"
    assert f"put it at {path}, then go on with: python data_tools/prepare" in err
