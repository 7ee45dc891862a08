"""Train a sentencepiece vocabulary with DeBERTa's special ids on your own text.

    python data_tools/train_tokenizer.py -i corpus/ -o spm.model --vocab_size 32000

The settings are those of the public v3 vocabulary: a unigram model, nmt_nfkc normalisation, byte
pieces for characters without a piece of their own, and [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3. [MASK]
is not in it: DebertaTokenizer appends it. The same input gives the same file.

A run of more than 1,000 characters without a space (base64, a line of dashes, Chinese in one
line) is cut, because it would spoil the vocabulary. The command says how many were.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread

from inputs import find_files
from lines import CutRuns, cut_lines
from meter import Meter, Stopwatch
from restart import write_file
from sentencepiece import SentencePieceTrainer, set_random_generator_seed
from sources import PIECE, read_texts

MAX_LINES = 500_000  # of Wikipedia: some 3 GB of memory and ten minutes


def main() -> int:
    """Run the command and return its exit code."""
    args = parse_args()
    try:
        found = find_files(args.input)
        for line in found.left_out():
            print(line)
        runs = CutRuns()
        model = train_with_progress(found.files, runs, args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.output, model)
    except KeyboardInterrupt:
        print("\nstopped; no vocabulary was written", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # sentencepiece may be at work in its thread, which cannot be stopped
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if report := runs.report():
        print(report)
    print(f"{args.output}: {args.vocab_size:,} pieces; [MASK] is added when it is used")
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-i", "--input", nargs="+", required=True, help="files, folders or quoted globs")
    add("-o", "--output", type=Path, required=True, help="the vocabulary to write: spm.model")
    add("--vocab_size", type=int, required=True, help="pieces, including special and byte pieces")
    add("--character_coverage", type=float, default=0.9995, help="the rest is spelled in bytes")
    add("--max_lines", type=int, default=MAX_LINES, help="use a random choice of this many lines")
    add("--text_field", default="text", help="field of JSON lines, column of Parquet")
    args = parser.parse_args()
    if args.max_lines <= 100:
        parser.error(f"--max_lines must be more than 100; got {args.max_lines}")
    return args


def train_with_progress(files: list[Path], runs: CutRuns, args: argparse.Namespace) -> bytes:
    """Read the files and train; this thread shows how far it is, and hears Ctrl-C."""
    meter = Meter(sum(file.stat().st_size for file in files))
    stopwatch = Stopwatch("training the vocabulary")

    def lines() -> Iterator[str]:
        texts = read_texts(files, text_field=args.text_field, show=meter.show)
        yield from cut_lines(texts, runs)
        meter.close()
        stopwatch.start()

    model = in_background(
        lambda: train_tokenizer(
            lines(),
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            max_lines=args.max_lines,
        )
    )
    try:
        while not wait([model], timeout=1).done:
            stopwatch.show()
    finally:
        meter.close()
        stopwatch.close()
    return model.result()


def in_background(work: Callable[[], bytes]) -> Future[bytes]:
    """Do it in a thread that does not keep the process from ending."""
    result = Future[bytes]()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # for the thread that asks for the result
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result


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
