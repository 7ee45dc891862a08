"""Turn text into rows of token ids: the data folder that run_pretrain.py reads.

    python data_tools/prepare_data.py -i corpus/ -o data/corpus --vocab spm.model

Documents are put one after the other and cut into rows of max_seq_length - 2 ids, as the original
does, but into Arrow shards (see ds_deberta/data/shards.py), by all cores and in bounded memory.
With --pack_documents each document is cut by itself, and last pieces (most documents are nothing
else) share rows, with [SEP] [CLS] between them. sources.py lists the formats. A whole document is
for training or for validation; chance decides, and depends only on its number.

You can stop it at any time: the same command goes on after the last finished shard, and the folder
is the same to the byte. It reads the file that it stopped in again, but encodes nothing that is in
a finished shard.

A plain text file (.txt) is one document. --documents blank_line parts it at blank lines, and
--documents line at each line end; blank lines are no documents then.

Nothing is skipped in silence. A file that cannot be read to its end is an error, and so is a line
of JSON without text or with half a character (a lone surrogate). Empty documents are counted, and
so are hidden files and files of other kinds in a folder, which are left out. NUL and other control
characters reach the vocabulary. A text with no line end or space in 262,144 characters is cut
there, which makes two words of one.
"""

import argparse
import hashlib
import os
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from encoding import SPLITS, Input, choose_split, encode_chunks, read_chunks
from inputs import find_files
from meter import Meter
from restart import VOCAB_FILE, begin, locked, save_progress
from rows import RowWriter
from sources import DOCUMENTS, kind_of

from ds_deberta.data.added_words import check_added_words
from ds_deberta.data.shards import (
    FORMAT_VERSION,
    ROWS_PER_SHARD,
    Manifest,
    TokenizerInfo,
)
from ds_deberta.data.tokenizer import DebertaTokenizer
from ds_deberta.hf_tokenizer import read_vocabulary

MIN_VALID_ROWS_PER_SHARD = 256


def main() -> int:
    """Run the command and return its exit code."""
    args = parse_args()
    try:
        prepare(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("error: a worker was killed (out of memory?); try fewer --workers", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-i", "--input", nargs="+", required=True, help="files, folders or quoted globs")
    add("-o", "--output", type=Path, required=True, help="the data folder to make")
    add("--vocab", type=Path, required=True, help="a sentencepiece model: spm.model")
    add("--max_seq_length", type=int, default=512, help="of a row with its [CLS] and [SEP]")
    add("--keep_documents_apart", action="store_true", help="no row holds parts of two documents")
    add("--pack_documents", action="store_true", help="a row's documents do not see each other")
    add("--valid_fraction", type=float, default=0.01, help="of the documents, for validation")
    add("--valid_input", nargs="+", default=[], help="take validation from here instead")
    add("--text_field", default="text", help="field of JSON lines, column of Parquet")
    add(
        "--documents",
        choices=DOCUMENTS,
        default="file",
        help="what a document of plain text (.txt) is: the whole file (default), what stands "
        "between blank lines, or a line",
    )
    add("--seed", type=int, default=0, help="of the choice of validation documents")
    add("--rows_per_shard", type=int, default=ROWS_PER_SHARD)
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores + 1, help="processes that encode; 0: this one does")
    add("--overwrite", action="store_true", help="replace what is finished, or of other settings")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the command where a flag's value is not possible."""
    if not 0 <= args.valid_fraction < 1:
        parser.error(f"--valid_fraction must be in [0, 1); got {args.valid_fraction}")
    if args.max_seq_length < 3:
        parser.error(f"--max_seq_length must be at least 3; got {args.max_seq_length}")
    if not 0 < args.rows_per_shard * args.max_seq_length < 2**31:
        parser.error("--rows_per_shard x --max_seq_length must be between 1 and 2^31 - 1")
    if args.keep_documents_apart and args.pack_documents:
        parser.error(
            "--keep_documents_apart (a row holds one document) and --pack_documents (it may hold "
            "several) must not be given together; leave one of them out"
        )
    if args.workers < 0:
        parser.error(f"--workers must not be negative; got {args.workers}")


def prepare(args: argparse.Namespace) -> None:
    """Make the data folder, or what is missing of it."""
    tokenizer = DebertaTokenizer(args.vocab)
    read_vocabulary(args.vocab)  # a training would refuse what this refuses
    check_added_words(args.vocab, tokenizer)
    separator = (tokenizer.special.sep, tokenizer.special.cls) if args.pack_documents else None
    inputs = find_inputs(args)
    settings = describe(args, inputs, tokenizer)
    with locked(args.output):
        progress = begin(args.output, settings, args.vocab.read_bytes(), overwrite=args.overwrite)
        if progress is None:
            print(f"{args.output} is ready: the same command made it before (--overwrite: again)")
            return
        writers = {
            split: RowWriter(
                args.output / split,
                progress[split],
                row_length=args.max_seq_length - 2,
                rows_per_shard=rows_per_shard(args, split),
                keep_documents_apart=args.keep_documents_apart,
                separator=separator,
            )
            for split in SPLITS
        }
        started, before = time.monotonic(), {split: writers[split].tokens for split in SPLITS}
        write_rows(args, inputs, settings, writers)
        check_sizes(args, inputs, writers)
        splits = {split: writer.close() for split, writer in writers.items()}
        save_progress(args.output, settings, {s: writers[s].progress for s in SPLITS})
        Manifest(
            tokenizer=TokenizerInfo(
                file=VOCAB_FILE, sha256=tokenizer.sha256, num_tokens=tokenizer.num_tokens
            ),
            max_seq_length=args.max_seq_length,
            keep_documents_apart=args.keep_documents_apart,
            packed=args.pack_documents,
            documents=args.documents,
            splits=splits,
        ).save(args.output)
    for split, info in splits.items():
        speed = (info.tokens - before[split]) / (time.monotonic() - started)
        empty = writers[split].progress.begun - info.documents
        fill = (info.tokens + 2 * info.rows) / max(1, info.rows * args.max_seq_length)
        print(
            f"{split}: {info.rows:,} rows, {info.tokens:,} tokens, {info.documents:,} documents "
            f"(and {empty:,} empty ones), rows {fill:.1%} full, {speed:,.0f} tokens/s"
        )


def write_rows(
    args: argparse.Namespace,
    inputs: list[Input],
    settings: dict[str, Any],
    writers: dict[str, RowWriter],
) -> None:
    """Read, encode and write everything but the last, unfinished shards."""
    meter = Meter(sum(source.path.stat().st_size for source in inputs))
    chunks = read_chunks(
        inputs,
        {split: writer.progress.place for split, writer in writers.items()},
        text_field=args.text_field,
        documents=args.documents,
        seed=args.seed,
        valid_fraction=args.valid_fraction,
    )
    for chunk, ids, lengths in encode_chunks(
        chunks, vocab=args.vocab, text_field=args.text_field, workers=args.workers
    ):
        writer = writers[chunk.split]
        finished, end = writer.progress, 0
        for place, record, length in zip(chunk.places, chunk.records, lengths, strict=True):
            start, end = end, end + length
            writer.add(place, starts_document=record.starts_document, ids=ids[start:end])
        if writer.progress is not finished:
            save_progress(args.output, settings, {s: writers[s].progress for s in SPLITS})
        meter.show(chunk.bytes_read)
    meter.close()


def find_inputs(args: argparse.Namespace) -> list[Input]:
    """List the files to read, those for validation alone last."""
    is_split = args.valid_fraction > 0 and not args.valid_input
    inputs: list[Input] = []
    for names, splits in (
        (args.input, SPLITS if is_split else ("train",)),
        (args.valid_input, ("valid",)),
    ):
        found = find_files(names)
        inputs += [Input(file, splits) for file in found.files]
        for line in found.left_out():
            print(line)
    times = Counter(os.path.realpath(source.path) for source in inputs)
    if twice := [path for path, count in times.items() if count > 1]:
        raise ValueError(f"{twice[0]} must be given once in --input and --valid_input together")
    kinds = {kind_of(source.path.name) for source in inputs}
    if args.documents != "file" and "text" not in kinds:
        raise ValueError(
            f"--documents {args.documents} is for plain text, and no input is a .txt file; "
            "leave it out"
        )
    if args.documents == "file" and kinds == {"text"}:  # no need to read them
        used = {
            choose_split(source.splits, (i, 0), seed=args.seed, fraction=args.valid_fraction)
            for i, source in enumerate(inputs)
        }
        for split in set(inputs[0].splits) - used:
            raise ValueError(too_short(split, "no document", args, inputs))
    return inputs


def rows_per_shard(args: argparse.Namespace, split: str) -> int:
    """Let both splits' shards fill at one pace: a restart goes back to the older last shard."""
    if split == "train" or args.valid_input:
        return args.rows_per_shard
    share = round(args.rows_per_shard * args.valid_fraction)
    return min(args.rows_per_shard, max(MIN_VALID_ROWS_PER_SHARD, share))


def describe(
    args: argparse.Namespace, inputs: list[Input], tokenizer: DebertaTokenizer
) -> dict[str, Any]:
    """Return all that the folder's content depends on."""
    digest, size = hashlib.sha256(), 0
    for source in inputs:
        stat = source.path.stat()
        what = (os.path.realpath(source.path), source.splits, stat.st_size, stat.st_mtime_ns)
        digest.update(repr(what).encode())
        size += stat.st_size
    names = ("max_seq_length", "keep_documents_apart", "pack_documents", "documents")
    names += ("valid_fraction", "text_field", "seed", "rows_per_shard")
    return {
        "format_version": FORMAT_VERSION,
        **{name: getattr(args, name) for name in names},
        "vocabulary": tokenizer.sha256,
        "input": f"{len(inputs)} files, {size} bytes, {digest.hexdigest()[:16]}",
    }


def check_sizes(
    args: argparse.Namespace, inputs: list[Input], writers: dict[str, RowWriter]
) -> None:
    """Refuse a corpus that is too short to train on or to validate with."""
    tokens = {split: writer.tokens for split, writer in writers.items()}
    if tokens["train"] < args.max_seq_length - 2:
        found = f"{tokens['train']} tokens, not one full row"
        raise ValueError(too_short("train", found, args, inputs))
    if not tokens["valid"] and (args.valid_fraction > 0 or args.valid_input):
        raise ValueError(too_short("valid", "no tokens", args, inputs))


def too_short(split: str, found: str, args: argparse.Namespace, inputs: list[Input]) -> str:
    """Say what to do about a split that is too short."""
    advice = (
        "Give more documents, another --valid_fraction or --seed, or validation files with "
        "--valid_input (--valid_fraction 0: no validation)."
    )
    texts = [source.path for source in inputs if kind_of(source.path.name) == "text"]
    if texts and args.documents == "file":
        advice = (
            f"{texts[0]} counts as one document, as every .txt file does (--documents file). If it "
            "has blank lines between documents, or a document per line, give --documents "
            f"blank_line or --documents line. Else: {advice[0].lower()}{advice[1:]}"
        )
    return f"the {split} split would get {found}. {advice}"


if __name__ == "__main__":
    sys.exit(main())
