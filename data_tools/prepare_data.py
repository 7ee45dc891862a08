"""Turn text into rows of token ids: the data folder that run_pretrain.py reads.

    python data_tools/prepare_data.py -i corpus/ -o data/corpus --vocab spm.model

Documents are put one after the other and cut into rows of max_seq_length - 2 ids, as the original
does, but into Arrow shards (see ds_deberta/data/shards.py), by all cores and in bounded memory.
With --pack_documents each document is cut by itself, and last pieces (most documents are nothing
else) share rows, with [SEP] [CLS] between them. sources.py lists the formats. A document goes whole
to training or to validation, by chance but by its number alone.

Stop it when you like, or let it crash: the same command goes on after the last finished shard, and
the folder comes out the same to the byte. It reads the file it was in again, but encodes nothing
that is in a finished shard.

Nothing is skipped in silence. A file that cannot be read to its end is an error, and so is a line
of JSON without text or with half a character (a lone surrogate). Empty documents are counted. NUL
and the like reach the vocabulary. A text with no line end or space in 262,144 characters is cut
there, which makes two words of one.
"""

import argparse
import hashlib
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from encoding import SPLITS, Input, choose_split, encode_chunks, read_chunks
from restart import VOCAB_FILE, begin, locked, save_progress
from rows import RowWriter
from sources import find_files, kind_of
from tqdm import tqdm

from ds_deberta.data.shards import (
    FORMAT_VERSION,
    ROWS_PER_SHARD,
    Manifest,
    TokenizerInfo,
)
from ds_deberta.data.tokenizer import DebertaTokenizer

MIN_VALID_ROWS_PER_SHARD = 256
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


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
    add("--seed", type=int, default=0, help="of the choice of validation documents")
    add("--rows_per_shard", type=int, default=ROWS_PER_SHARD)
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores + 1, help="processes that encode; 0: this one does")
    add("--overwrite", action="store_true", help="replace what is finished, or of other settings")
    args = parser.parse_args(argv)
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
    return args


def prepare(args: argparse.Namespace) -> None:
    """Make the data folder, or what is missing of it."""
    tokenizer = DebertaTokenizer(args.vocab)
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
        check_sizes(args, writers)
        splits = {split: writer.close() for split, writer in writers.items()}
        save_progress(args.output, settings, {s: writers[s].progress for s in SPLITS})
        Manifest(
            tokenizer=TokenizerInfo(
                file=VOCAB_FILE, sha256=tokenizer.sha256, num_tokens=tokenizer.num_tokens
            ),
            max_seq_length=args.max_seq_length,
            keep_documents_apart=args.keep_documents_apart,
            packed=args.pack_documents,
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
        files, left_out = find_files(names)
        inputs += [Input(file, splits) for file in files]
        if left_out:
            print(f"left out {len(left_out)} files of other kinds: {left_out[0]}, ...")
    paths = [source.path.resolve() for source in inputs]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice} must be given once in --input and --valid_input together")
    if all(kind_of(path.name) == "text" for path in paths):  # a document each: no need to read
        used = {
            choose_split(source.splits, (i, 0), seed=args.seed, fraction=args.valid_fraction)
            for i, source in enumerate(inputs)
        }
        for split in set(inputs[0].splits) - used:
            raise ValueError(too_short(split, "no document (a .txt file is one document)"))
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
        what = (str(source.path.resolve()), source.splits, stat.st_size, stat.st_mtime_ns)
        digest.update(repr(what).encode())
        size += stat.st_size
    names = ("max_seq_length", "keep_documents_apart", "pack_documents", "valid_fraction")
    return {
        "format_version": FORMAT_VERSION,
        **{name: getattr(args, name) for name in (*names, "text_field", "seed", "rows_per_shard")},
        "vocabulary": tokenizer.sha256,
        "input": f"{len(inputs)} files, {size} bytes, {digest.hexdigest()[:16]}",
    }


def check_sizes(args: argparse.Namespace, writers: dict[str, RowWriter]) -> None:
    """Refuse a corpus that is too short to train on or to validate with."""
    if writers["train"].tokens < args.max_seq_length - 2:
        raise ValueError(too_short("train", f"{writers['train'].tokens} tokens, not one full row"))
    if not writers["valid"].tokens and (args.valid_fraction > 0 or args.valid_input):
        raise ValueError(too_short("valid", "no tokens"))


def too_short(split: str, found: str) -> str:
    """Say what to do about a split that is too short."""
    return (
        f"the {split} split would get {found}. Give more documents, another --valid_fraction or "
        "--seed, or validation files with --valid_input (--valid_fraction 0: no validation)."
    )


class Meter:
    """Show how many of the input's bytes are done: a bar, or lines where there is no terminal."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)
        self.total = total
        self.started = self.shown = time.monotonic()

    def show(self, done: int) -> None:
        """Show it if it is time."""
        self.bar.update(max(0, done - self.bar.n))
        now = time.monotonic()
        if self.bar.disable and now - self.shown >= SECONDS_BETWEEN_LINES:
            elapsed, self.shown = now - self.started, now
            line = tqdm.format_meter(done, self.total, elapsed, unit="B", unit_scale=True)
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal to others."""
        self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
