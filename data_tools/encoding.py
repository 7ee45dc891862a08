"""Encode the records of many files in many processes, in order and in bounded memory."""

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
from rows import Place
from sentencepiece import SentencePieceProcessor
from sources import PIECE, Record, cut_text, parse, read_records

SPLITS = ("train", "valid")
CHUNK = 4 * PIECE  # characters, so that sending them to another process costs next to nothing
AHEAD = 12  # chunks to encode while a shard goes to disk


@dataclass(frozen=True)
class Input:
    """A file, and the splits that its documents may go to."""

    path: Path
    splits: tuple[str, ...]


@dataclass
class Chunk:
    """Records of one split, enough of them to be worth sending to another process."""

    split: str
    places: list[Place] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    size: int = 0
    bytes_read: int = 0  # of all files, when the chunk was full


def choose_split(splits: tuple[str, ...], document: Place, *, seed: int, fraction: float) -> str:
    """Choose a document's split, by its file's number and its number in the file.

    Of 1 / `fraction` documents in a row one goes to validation, which one is a matter of chance: a
    document owns an interval of that length, and each unit interval has one point at random.
    """
    if len(splits) == 1:
        return splits[0]
    file, number = document
    start, end = number * fraction, (number + 1) * fraction
    for unit in {int(start), int(end)}:
        if start <= unit + _draw(seed, file, unit) < end:
            return "valid"
    return "train"


@lru_cache(maxsize=4)
def _draw(seed: int, file: int, unit: int) -> float:
    """Draw a number from [0, 1)."""
    digest = hashlib.blake2b(f"{seed} {file} {unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def read_chunks(
    inputs: list[Input],
    starts: dict[str, Place],
    *,
    text_field: str,
    documents: str,
    seed: int,
    valid_fraction: float,
) -> Iterator[Chunk]:
    """Read all files; of each split, leave out the records before its start."""
    chunks = {split: Chunk(split) for split in SPLITS}
    bytes_read = 0
    for number, source in enumerate(inputs):
        size = source.path.stat().st_size
        if any(starts[split] < (number + 1, 0) for split in source.splits):
            with source.path.open("rb") as raw:
                document, split = -1, ""
                records = read_records(raw, text_field=text_field, documents=documents)
                for count, record in enumerate(records):
                    if record.starts_document:
                        document += 1
                        split = choose_split(
                            source.splits, (number, document), seed=seed, fraction=valid_fraction
                        )
                    if (number, count) < starts[split]:
                        continue
                    chunk = chunks[split]
                    chunk.places.append((number, count))
                    chunk.records.append(record)
                    chunk.size += len(record.raw)
                    if chunk.size >= CHUNK:
                        chunk.bytes_read = bytes_read + raw.tell()
                        yield chunk
                        chunks[split] = Chunk(split)
        bytes_read += size
    for chunk in chunks.values():
        if chunk.records:
            chunk.bytes_read = bytes_read
            yield chunk


def encode_chunks(
    chunks: Iterable[Chunk], *, vocab: Path, text_field: str, workers: int
) -> Iterator[tuple[Chunk, np.ndarray, list[int]]]:
    """Yield each chunk with the ids of its records, joined, and the number of ids of each."""
    encode = partial(encode_records, vocab=vocab, text_field=text_field)
    if not workers:
        for chunk in chunks:
            yield chunk, *encode(chunk.records)
        return
    _load_processor(vocab)  # before the fork: processes that share its pages share their cache, too
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_follow_parent) as pool:
        pending: deque[tuple[Chunk, Future[tuple[np.ndarray, list[int]]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, pool.submit(encode, chunk.records)))
            if len(pending) > 2 * workers + AHEAD:
                chunk, future = pending.popleft()
                yield chunk, *future.result()
        for chunk, future in pending:
            yield chunk, *future.result()


def encode_records(
    records: list[Record], *, vocab: Path, text_field: str
) -> tuple[np.ndarray, list[int]]:
    """Return the ids of all records, joined, and the number of ids of each."""
    pieces = [list(cut_text(parse(record, text_field=text_field))) for record in records]
    encoded = _load_processor(vocab).encode([text for texts in pieces for text in texts])
    lengths = map(len, encoded)
    return np.concatenate(encoded), [sum(islice(lengths, len(texts))) for texts in pieces]


@cache
def _load_processor(vocab: Path) -> SentencePieceProcessor:
    """Load what DebertaTokenizer wraps: arrays instead of its lists save a tenth of the time."""
    return SentencePieceProcessor(model_file=str(vocab), num_threads=1, out_type="numpy")


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it: a killed process cannot end others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
