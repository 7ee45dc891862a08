"""The exported tokenizer against ours, which is sentencepiece itself."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ds_deberta.data import DebertaTokenizer
from ds_deberta.hf_tokenizer import write_tokenizer

SENTENCES = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "it was [1] a bright cold day in April (1984); the clocks were striking 13!",
    "caf\u00e9s na\u00efve fa\u00e7ade \u00c5ngstr\u00f6m, <0x41> is A",
    "a fix, half of 1/2 TM: 123 456 789 fi fl ...",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u043f\u0440\u0438\u0432\u0435\u0442",
]
MESSY = [
    "",
    " ",
    "\n\t ",
    "a",
    " leading and trailing  ",
    "multiple   spaces\tand\ttabs\r\nand\n\nlines",
    "no\u00a0break\u3000wide\u2003em\u200bzero\u2028line\ufeffmark",
    "control \x00 \x01\x07 \x7f characters",
    "\u2581a\u2581 b\u2581",
    "\ufb01x \u00bd \u2122 \uff21\uff22\uff23 \u2460 \u212b \u2026 \uff5e",
    "caf\u00e9 cafe\u0301 nai\u0308ve A\u030a",
    "\U0001f642 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f 1\ufe0f\u20e3",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \ue000\U000e0041\U0001d54f",
    "unknown \u0ca0_\u0ca0 \u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940\u0661\u0662",
    "\u0645\u0651\u064e\u062d \u05e9\u05c1\u05b8\u05dc\u05d5\u05dd",
    "<0x41> <0xFF> <s> <unk> \uff3b\uff23\uff2c\uff33\uff3d [CLS [MASK MASK]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
    " ".join(SENTENCES),
    unicodedata.normalize("NFD", " ".join(SENTENCES[:4])),
]
CHARACTERS = [chr(i) for i in range(0x3400) if unicodedata.category(chr(i)) != "Cn"]


def train(folder: Path, **options: Any) -> Path:
    """Train a vocabulary small enough to leave much of MESSY unknown."""
    settings: dict[str, Any] = {
        "vocab_size": 120,
        "hard_vocab_limit": False,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "pad_piece": "[PAD]",
        "bos_piece": "[CLS]",
        "eos_piece": "[SEP]",
        "unk_piece": "[UNK]",
        "model_prefix": str(folder / "spm"),
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), **settings | options
    )
    return folder / "spm.model"


def export(vocab_file: Path, out_dir: Path) -> PreTrainedTokenizerBase:
    out_dir.mkdir()
    (out_dir / "config.json").write_text('{"model_type": "deberta-v2"}')  # as beside a model
    write_tokenizer(vocab_file, out_dir, max_length=77)
    return AutoTokenizer.from_pretrained(out_dir)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "vocab_size": 380},
        {"control_symbols": "[MASK]"},
        {"normalization_rule_name": "identity"},
    ],
)
def test_messy_text_gets_the_same_ids(options: dict[str, Any], tmp_path: Path):
    vocab_file = train(tmp_path, **options)
    ours = DebertaTokenizer(vocab_file)
    theirs = export(vocab_file, tmp_path / "out")
    assert theirs.is_fast
    for text in [*MESSY, *[f"the{character} dog" for character in CHARACTERS]]:
        assert theirs(text)["input_ids"] == [1, *ours.encode(text), 2], ascii(text)


def test_vocabulary_and_special_tokens_are_ours(vocab_file: Path, tmp_path: Path):
    theirs = export(vocab_file, tmp_path / "out")
    ours = DebertaTokenizer(vocab_file)
    assert len(theirs) == ours.num_tokens
    ids = list(range(ours.num_tokens))
    assert theirs.convert_ids_to_tokens(ids) == ours.pieces(ids)
    special = [getattr(theirs, f"{name}_token_id") for name in ("pad", "cls", "sep", "unk", "mask")]
    assert tuple(special) == ours.special.ids()
    assert theirs.model_max_length == 77
    assert (tmp_path / "out" / "spm.model").read_bytes() == vocab_file.read_bytes()


def test_special_tokens_in_text_become_ids_unless_told_otherwise(tmp_path: Path):
    vocab_file = train(tmp_path)
    theirs = export(vocab_file, tmp_path / "out")
    ours = DebertaTokenizer(vocab_file)
    fox, dog, mask = ours.encode("the fox"), ours.encode("the dog"), ours.special.mask
    assert theirs("the fox [MASK] the dog")["input_ids"] == [1, *fox, mask, *dog, 2]
    assert theirs("the fox", "the dog")["input_ids"] == [1, *fox, 2, *dog, 2]
    for text in ("the [MASK] fox", "[CLS][SEP] [UNK][PAD]"):
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == [1, *ours.encode(text), 2]


def test_decoding_restores_the_text(vocab_file: Path, tmp_path: Path):
    theirs = export(vocab_file, tmp_path / "out")
    text = "the old king builds a city."
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"split_by_whitespace": False, "split_by_unicode_script": False},
        {"user_defined_symbols": "fox"},
    ],
)
def test_a_vocabulary_without_equal_is_refused(options: dict[str, Any], tmp_path: Path):
    vocab_file = train(tmp_path, **options)
    with pytest.raises(ValueError, match="must be a unigram vocabulary"):
        export(vocab_file, tmp_path / "out")
