"""Train a sentencepiece vocabulary with DeBERTa's special ids on your own text.

    python data_tools/train_tokenizer.py -i corpus/ -o spm.model --vocab_size 32000

The settings are those of the public v3 vocabulary: a unigram model, nmt_nfkc normalisation, byte
pieces for characters without a piece of their own, and [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3. [MASK]
is not in it: DebertaTokenizer appends it. The same input gives the same file.
"""

import argparse
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from inputs import find_files
from restart import write_file
from sentencepiece import SentencePieceTrainer, set_random_generator_seed
from sources import PIECE, cut_text, read_texts

MAX_LINES = 500_000  # of Wikipedia: some 3 GB of memory and ten minutes


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-i", "--input", nargs="+", required=True, help="files, folders or quoted globs")
    add("-o", "--output", type=Path, required=True, help="the vocabulary to write: spm.model")
    add("--vocab_size", type=int, required=True, help="pieces, with special and 256 byte pieces")
    add("--character_coverage", type=float, default=0.9995, help="the rest is spelled in bytes")
    add("--max_lines", type=int, default=MAX_LINES, help="a random choice of so many is used")
    add("--text_field", default="text", help="field of JSON lines, column of Parquet")
    args = parser.parse_args()
    if args.max_lines <= 100:
        parser.error(f"--max_lines must be more than 100; got {args.max_lines}")
    try:
        found = find_files(args.input)
        for line in found.left_out():
            print(line)
        model = train_tokenizer(
            cut_lines(read_texts(found.files, text_field=args.text_field)),
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            max_lines=args.max_lines,
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.output, model)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {args.vocab_size:,} pieces; [MASK] comes on top when it is used")
    return 0


def train_tokenizer(
    lines: Iterable[str],
    *,
    vocab_size: int,
    character_coverage: float = 0.9995,
    max_lines: int = MAX_LINES,
) -> bytes:
    """Return a trained sentencepiece model."""
    model = io.BytesIO()
    set_random_generator_seed(0)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="[PAD]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_piece="[UNK]",
            normalization_rule_name="nmt_nfkc",
            byte_fallback=True,
            max_sentencepiece_length=32,
            max_sentence_length=4 * PIECE,  # in bytes: no line is too long
            input_sentence_size=max_lines,
            shuffle_input_sentence=True,
            num_threads=16,  # not of this machine: the sums' order shows in the result
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def cut_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines that are not blank, those of enormous length in pieces."""
    for text in texts:
        for line in text.split("\n"):
            if line.strip():
                yield from cut_text(line)


def _explain(message: str, vocab_size: int) -> str:
    if largest := re.search(r"set it to a value <= (\d+)", message):
        found = f"is too small a corpus for {vocab_size} pieces; it has {largest[1]} at most"
    elif smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        found = (
            f"needs {smallest[1]} pieces at least for its characters alone; got {vocab_size}. "
            "A lower --character_coverage needs fewer"
        )
    elif "empty()" in message or "all_chars_count" in message:
        found = "holds no text"
    else:
        found = f"was refused by sentencepiece: {message}"
    return f"the input {found}"


if __name__ == "__main__":
    sys.exit(main())
