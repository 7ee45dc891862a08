"""Damaged data are found before the first step, on all ranks, by name and with the cure."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_deberta.agreement import check_data
from tests.launch import ROOT, run_ranks

SHARD = "train/00001.arrow"
AGAIN = r"Prepare the data again with data_tools/prepare_data\.py"
ONCE_MORE = "Give the command that prepared the data once more"


def flip_bit(file: Path, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)


def change_digit(folder: Path, name: str) -> None:
    """Add 1 to the first digit of a field of the manifest."""
    file = folder / "manifest.json"
    changed, count = re.subn(
        rf'("{name}": )(\d)', lambda m: f"{m[1]}{(int(m[2]) + 1) % 10}", file.read_text(), count=1
    )
    assert count == 1
    file.write_text(changed)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda d: flip_bit(d / SHARD), rf"{SHARD} is not what was written.*{AGAIN}"),
    "one in the held-out rows": (
        lambda d: flip_bit(d / "valid/00000.arrow"),
        rf"valid/00000.arrow is not what was written.*{AGAIN}",
    ),
    "a cut shard": (lambda d: cut(d / SHARD), rf"{SHARD} must have \d+ bytes; it has.*{AGAIN}"),
    "shards of one size swapped": (
        lambda d: swap(d, "train/00001.arrow", "train/00002.arrow"),
        rf"00001.arrow (is not what|must have)(.|\n)*00002.arrow (is not what|must have).*{AGAIN}",
    ),
    "a missing shard": (lambda d: (d / SHARD).unlink(), rf"{SHARD} .*is missing.*{AGAIN}"),
    "a folder instead": (
        lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()),
        rf"{SHARD} (can not be read|must have).*{AGAIN}",
    ),
    "half a manifest": (
        lambda d: (d / "manifest.json").write_bytes((d / "manifest.json").read_bytes()[:300]),
        rf"manifest.json is damaged.*{AGAIN}",
    ),
    "a digit of max_seq_length": (lambda d: change_digit(d, "max_seq_length"), ONCE_MORE),
    "a digit of a split's rows": (lambda d: change_digit(d, "rows"), ONCE_MORE),
    "a digit of a shard's bytes": (lambda d: change_digit(d, "bytes"), ONCE_MORE),
    "a digit of the vocabulary's size": (lambda d: change_digit(d, "num_tokens"), ONCE_MORE),
    "a missing manifest": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json.*Give"),
    "a flipped bit in the vocabulary": (
        lambda d: flip_bit(d / "spm.model"),
        rf"spm.model must be the vocabulary that the data was made with.*{AGAIN}",
    ),
    "an empty vocabulary": (
        lambda d: (d / "spm.model").write_bytes(b""),
        rf"spm.model must be the vocabulary that the data was made with.*{AGAIN}",
    ),
    "a missing vocabulary": (lambda d: (d / "spm.model").unlink(), r"there is no .*spm\.model"),
}


@pytest.fixture
def damaged(data_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data_dir, tmp_path / "data")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_file_is_named_with_the_cure(damaged: Path, fault: str):
    damage, message = FAULTS[fault]
    check_data(damaged)
    damage(damaged)
    with pytest.raises(ValueError, match=message):
        check_data(damaged)


def test_any_bit_of_the_manifest_and_the_vocabulary_counts(damaged: Path):
    """A hundred bits of each; of the manifest, white space alone may change unnoticed."""
    for name in ("manifest.json", "spm.model"):
        file = damaged / name
        whole = file.read_bytes()
        for position in range(0, 8 * len(whole), 8 * len(whole) // 100 | 1):
            content = bytearray(whole)
            content[position // 8] ^= 1 << position % 8
            file.write_bytes(content)
            if name == "manifest.json" and content.split() == whole.split():
                continue
            with pytest.raises(ValueError, match=name):
                check_data(damaged)
        file.write_bytes(whole)


def test_time_and_size_are_logged(data_dir: Path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ds_deberta"), "propagate", True)
    with caplog.at_level(logging.INFO, "ds_deberta"):
        check_data(data_dir)
    size = sum(file.stat().st_size for file in data_dir.glob("*/*.arrow")) / 1e9
    (line,) = (line for line in caplog.messages if "verified" in line)
    assert re.fullmatch(
        rf"verified 5 shards, {size:.3g} GB, in [\d.]+ s; 1 processes of each node shared them",
        line,
    )


TWO_RANKS = ["a flipped bit", "a missing shard", "a cut shard", "a digit of max_seq_length"]
TWO_RANKS += ["a flipped bit in the vocabulary", "a missing manifest"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] if i else []) for i, f in enumerate(TWO_RANKS)],
)
def test_two_ranks_end_alike_before_the_first_step(
    damaged: Path, tiny_model_file: Path, tmp_path: Path, fault: str
):
    damage, message = FAULTS[fault]
    damage(damaged)
    arguments = ["--objective", "mlm", "--model", str(tiny_model_file), "--max_seq_length", "32"]
    arguments += ["--data_dir", str(damaged), "--output_dir", str(tmp_path / "run")]
    script = ROOT / "run_pretrain.py"
    printed = run_ranks(script, *arguments, world_size=2, timeout=60, status=2)
    assert re.search(message, printed), printed[-3000:]
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
