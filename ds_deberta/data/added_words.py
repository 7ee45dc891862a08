"""Words that the tokenizer of a Hugging Face folder adds to its sentencepiece model.

They are not in `spm.model`, so no text would become them.
"""

from pathlib import Path
from typing import Any

from ds_deberta.data.tokenizer import DebertaTokenizer
from ds_deberta.json_file import read_object


def check_added_words(vocab_file: Path, tokenizer: DebertaTokenizer) -> None:
    """Check that a vocabulary is all that the tokenizer in its folder knows.

    Args:
        vocab_file: a sentencepiece model; files of a Hugging Face tokenizer may lie beside it.
        tokenizer: says what ids and special tokens the vocabulary itself has.

    Raises:
        ValueError: the tokenizer there adds words.
    """
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        file = vocab_file.parent / name
        if not file.is_file():
            continue
        known = dict(enumerate(tokenizer.pieces(range(tokenizer.num_tokens))))
        for word, i in _words(name, read_object(file)):
            if known.get(i) != word:
                raise ValueError(
                    f"{vocab_file} must be the whole vocabulary; {file} adds {word!r} (id {i}), "
                    "which no text would become. To do without added words, use a copy of "
                    f"{vocab_file.name} in a folder of its own; to have them, train a vocabulary "
                    "on text with these words (data_tools/train_tokenizer.py)."
                )


def _words(name: str, values: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the words that a file of this name adds, with their ids."""
    try:
        if name == "added_tokens.json":
            return [(word, int(i)) for word, i in values.items()]
        if name == "tokenizer.json":
            return [(token["content"], token["id"]) for token in values.get("added_tokens", [])]
        tokens = values.get("added_tokens_decoder", {})
        return [(token["content"], int(i)) for i, token in tokens.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{name} beside the vocabulary must list added words as Hugging Face writes them; it "
            "does not. Use a copy of the vocabulary in a folder of its own."
        ) from None
