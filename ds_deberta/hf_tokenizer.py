"""The vocabulary for Hugging Face: what AutoTokenizer.from_pretrained needs to give our ids.

Text gets other ids than DebertaTokenizer's in three cases:

- It spells a special token ("[MASK]"), which users of Hugging Face expect to become that token.
  With split_special_tokens=True it does not, and the ids are ours (but for one more [UNK] where
  the vocabulary knows neither bracket nor letters).
- It has U+FFF0 or U+FFF1, which have no meaning in Unicode: the exported tokenizer removes them.
- Two ways to cut a word score almost alike: sentencepiece sums in fp32 along the whole text, so
  that far into a long text rounding decides.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from ds_deberta.data import DebertaTokenizer
from ds_deberta.hf_normalizer import build_normalizer

SPECIAL_TOKENS = {
    f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")
}
WORD_START = "\u2581"  # sentencepiece's mark for "a space came before"


def write_tokenizer(vocab_file: Path, folder: Path, *, max_length: int) -> None:
    """Write the sentencepiece model, its twin and their settings.

    Args:
        vocab_file: a sentencepiece model.
        folder: where to; must exist.
        max_length: tokens from which on Hugging Face warns and truncates.
    """
    shutil.copyfile(vocab_file, folder / "spm.model")
    # Not by its own `save`, which raises no OSError if the disk is full.
    twin = build_fast_tokenizer(vocab_file).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(twin, encoding="utf-8")
    # DebertaV2Tokenizer of transformers 5 puts its own normalizer in place of the file's.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    text = json.dumps(settings | SPECIAL_TOKENS, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text)


def build_fast_tokenizer(vocab_file: Path) -> Tokenizer:
    """Build the twin of a vocabulary: [CLS], the ids of DebertaTokenizer, [SEP]."""
    special = DebertaTokenizer(vocab_file).special
    model = read_vocabulary(vocab_file)
    trainer, charsmap = model.trainer_spec, model.normalizer_spec.precompiled_charsmap
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(Unigram(scores, trainer.unk_id, trainer.byte_fallback))
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([build_normalizer(charsmap)] if charsmap else []),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(rf"\A |[ {WORD_START}]+\z"), ""),
            normalizers.Prepend(WORD_START),  # not to an empty text
            normalizers.Replace(" ", WORD_START),
        ]
    )
    # In sentencepiece no text spells a control or byte piece. `tokenizers` does not tell kinds of
    # pieces apart: a cut after the first character keeps it from finding them.
    reserved = [piece.piece for piece in model.pieces if piece.type != piece.NORMAL]
    cuts = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in reserved)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cuts), "merged_with_previous"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special.cls), ("[SEP]", special.sep)],
    )
    return tokenizer


def read_vocabulary(vocab_file: Path) -> Any:
    """Read a sentencepiece model and check what the twin relies on: its trainer's defaults.

    Raises:
        ValueError: the vocabulary has no equal in Hugging Face.
    """
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(vocab_file.read_bytes())
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if not (
        trainer.model_type == trainer.UNIGRAM
        and normalizer.add_dummy_prefix
        and normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not trainer.treat_whitespace_as_suffix
        and not any(WORD_START in piece.piece[1:] for piece in model.pieces)
        and not any(piece.type in (piece.USER_DEFINED, piece.UNUSED) for piece in model.pieces)
    ):
        raise ValueError(
            f"{vocab_file} must be a unigram vocabulary with sentencepiece's defaults for white "
            "space and no user-defined symbols, or Hugging Face has no equal; it is not. Make one "
            "with data_tools/train_tokenizer.py."
        )
    return model
