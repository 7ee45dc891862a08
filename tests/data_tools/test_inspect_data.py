"""The report has the right numbers, and damage does not pass --verify."""

import shutil
import sys
from pathlib import Path

import inspect_data
import numpy as np
import pytest
from inspect_data import unigram_entropy

from ds_deberta.data import DebertaTokenizer, Manifest, ShardDataset


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command; return its exit code and what it said."""

    def run(*flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, flags)])
        return inspect_data.main(), *capsys.readouterr()

    return run


def test_the_report_shows_counts_lengths_rows_and_masks(inspect, data_dir: Path, tokenizer):
    code, out, err = inspect(data_dir, "--rows", 2, "--verify")
    assert (code, err) == (0, "")
    manifest = Manifest.load(data_dir)
    train = ShardDataset(data_dir, "train", manifest)
    assert f"train: 200 rows, {manifest.splits['train'].tokens:,} tokens, 600 documents" in out
    assert "valid: 24 rows" in out
    # 29 of the 200 train rows and 4 of the 24 valid rows have 11 ids, the others 30.
    assert "8-11 ids:  14.50% ######\n" in out
    assert "27-30 ids:  85.50% " in out
    assert "8-11 ids:  16.67%" in out
    for row in (0, 199):
        assert f"train row {row}: {tokenizer.decode(train[row])}\n" in out
    assert out.count("train row") == 2
    assert "all checksums are right" in out


def test_packed_rows_are_shown_with_their_documents(inspect, packed_data_dir: Path, tokenizer):
    code, out, err = inspect(packed_data_dir, "--rows", 2, "--verify")
    assert (code, err) == (0, "")
    assert "documents packed, apart from each other" in out
    train = ShardDataset(packed_data_dir, "train", Manifest.load(packed_data_dir))
    # 29 of the 200 train rows hold two documents, the others three.
    assert out.count("per row: 2.9\n") == 1
    assert out.count("per row: 2.8\n") == 1  # 4 of 24
    text = f"train row 199: {tokenizer.decode(train[199])}\n"
    assert text in out
    assert text.count("[SEP] [CLS]") == 2
    words = [row[row > 2] for row in (train[number] for number in range(200))]
    assert f"{unigram_entropy(words):.2f} nats" in out


def test_the_masked_examples_are_of_the_middle_row(inspect, data_dir: Path, tokenizer):
    _, out, _ = inspect(data_dir)
    row = ShardDataset(data_dir, "train", Manifest.load(data_dir))[100]
    _, rtd, mlm = out.split(" of 32: ")
    text, answers = rtd.split("\nto predict: ")
    answers = answers.split("\n")[0].split(" ")
    assert text.count("[MASK]") == len(answers) == 5
    # Putting the answers in place of the masks gives the row again.
    for answer in answers:
        text = text.replace("[MASK]", answer, 1)
    squeeze = str.maketrans("", "", " \u2581")
    assert text.translate(squeeze) == f"[CLS]{tokenizer.decode(row)}[SEP]".translate(squeeze)
    assert "[MASK]" in mlm


def test_damage_is_found_by_verify_alone(inspect, data_dir: Path, tmp_path: Path):
    copy = Path(shutil.copytree(data_dir, tmp_path / "copy"))
    shard = copy / "train/00001.arrow"
    content = bytearray(shard.read_bytes())
    position = content.rfind(DebertaTokenizer(copy / "spm.model").encode("the")[0])
    content[len(content) // 2] ^= 1
    assert position > 0
    shard.write_bytes(content)
    assert inspect(copy)[0] == 0
    code, _, err = inspect(copy, "--verify")
    assert code == 2
    assert "00001.arrow" in err
    assert len(err.splitlines()) == 1


def test_a_folder_without_data_is_an_error(inspect, tmp_path: Path):
    code, _, err = inspect(tmp_path)
    assert code == 2
    assert "manifest.json" in err


def test_the_unigram_entropy_is_that_of_the_frequencies():
    rows = [np.array([5, 5, 6]), np.array([7])]
    assert unigram_entropy(rows) == pytest.approx(1.5 * np.log(2))
