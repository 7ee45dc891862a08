"""What is fetched can be prepared, and without a network the message says how to go on."""

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


def write_parquet(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, rows in ARTICLES.items():
        for part, half in enumerate((rows[:3], rows[3:])):
            path = folder / f"{split}-0000{part}-of-00002.parquet"
            pq.write_table(pa.table({"text": pa.array(half, pa.string())}), path)


def test_wikitext_becomes_text_again(fetch, tmp_path: Path, monkeypatch):
    def snapshot_download(repo: str, *, repo_type: str, allow_patterns: str) -> Path:
        assert (repo, repo_type) == ("Salesforce/wikitext", "dataset")
        assert allow_patterns == "wikitext-103-raw-v1/*.parquet"
        write_parquet(tmp_path / "cache/wikitext-103-raw-v1")
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
    write_parquet(place)
    assert fetch("wikitext-103", tmp_path / "raw")[0] == 0


def test_damaged_parquet_is_named(fetch, tmp_path: Path):
    write_parquet(tmp_path / "wikitext-103-raw-v1")
    path = tmp_path / "wikitext-103-raw-v1/train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    code, _, err = fetch("wikitext-103", tmp_path / "raw")
    assert code == 2
    assert "train-00001-of-00002.parquet is damaged" in err
    assert not (tmp_path / "raw/wiki.train.raw").exists()


def test_the_public_vocabulary_is_fetched(fetch, tmp_path: Path, monkeypatch):
    def hf_hub_download(repo: str, name: str, *, local_dir: Path) -> str:
        assert (repo, name) == ("microsoft/deberta-v3-base", "spm.model")
        (local_dir / name).write_text("x")
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    code, out, _ = fetch("spm", tmp_path / "raw")
    assert code == 0
    assert str(tmp_path / "raw/spm.model") in out


def test_without_a_hub_the_vocabulary_can_be_placed_by_hand(fetch, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_hub)
    code, _, err = fetch("spm", tmp_path)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"put it at {tmp_path / 'spm.model'}, then go on with: python data_tools/prepare" in err
