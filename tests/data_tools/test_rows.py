"""Rows are a document's ids in order, and a writer goes on from any finished shard."""

import os
from pathlib import Path

import numpy as np
import pytest
from rows import Progress, RowWriter

from ds_deberta.data import Manifest, ShardDataset, SplitInfo, TokenizerInfo

ROW_LENGTH, ROWS_PER_SHARD = 7, 4


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def records(seed: int) -> list[tuple[tuple[int, int], bool, np.ndarray]]:
    """Documents of one to three records each, some without an id."""
    rng = np.random.default_rng(seed)
    made, number = [], 0
    for _ in range(40):
        for part in range(rng.integers(1, 4)):
            length = int(rng.choice([0, 1, 6, 7, 8, 14, 30]))
            ids = rng.integers(0, 1000, length, dtype=np.int32)
            made.append(((number // 10, number % 10), part == 0, ids))
            number += 1
    return made


SEPARATOR = (3000, 2000)  # no ids of a document
MODES = {
    "joined": {"keep_documents_apart": False},
    "apart": {"keep_documents_apart": True},
    "packed": {"keep_documents_apart": False, "separator": SEPARATOR},
}


def make_writer(folder: Path, progress: Progress, *, mode: str) -> RowWriter:
    return RowWriter(
        folder,
        progress,
        row_length=ROW_LENGTH,
        rows_per_shard=ROWS_PER_SHARD,
        **MODES[mode],
    )


def read_rows(folder: Path, split: SplitInfo) -> list[list[int]]:
    manifest = Manifest(
        tokenizer=TokenizerInfo(file="", sha256="", num_tokens=0),
        max_seq_length=ROW_LENGTH + 2,
        keep_documents_apart=False,
        splits={"train": split},
    )
    dataset = ShardDataset(folder, "train", manifest)
    dataset.verify()
    return [dataset[row].tolist() for row in range(len(dataset))]


def cut(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + ROW_LENGTH] for start in range(0, len(ids), ROW_LENGTH)]


@pytest.mark.parametrize("mode", ["joined", "apart"])
@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_all_ids_in_order(tmp_path: Path, seed: int, mode: str):
    writer = make_writer(tmp_path / "train", Progress(), mode=mode)
    documents: list[list[int]] = []
    for place, starts_document, ids in records(seed):
        if starts_document:
            documents.append([])
        documents[-1] += ids.tolist()
        writer.add(place, starts_document=starts_document, ids=ids)
    split = writer.close()
    joined = [i for document in documents for i in document]
    apart = [row for document in documents for row in cut(document)]
    expected = apart if mode == "apart" else cut(joined)
    assert read_rows(tmp_path, split) == expected
    assert (split.rows, split.tokens) == (len(expected), len(joined))
    assert split.documents == sum(map(bool, documents))
    assert writer.progress.begun == len(documents)
    assert [shard.rows for shard in split.shards[:-1]] == [ROWS_PER_SHARD] * (len(split.shards) - 1)


def pieces(row: list[int]) -> list[list[int]]:
    """Undo the packing of a row."""
    parts: list[list[int]] = [[]]
    for first, second in zip(row, [*row[1:], -1], strict=True):
        if (first, second) == SEPARATOR:
            parts.append([])
        elif first not in SEPARATOR:
            parts[-1].append(first)
    return parts


@pytest.mark.parametrize("open_rows", [1, 3, 16])
@pytest.mark.parametrize("seed", range(5))
def test_packed_rows_hold_every_piece_of_every_document_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, open_rows: int
):
    monkeypatch.setattr("rows.OPEN_ROWS", open_rows)
    rng = np.random.default_rng(seed)
    documents = [list(range(20 * n, 20 * n + rng.integers(0, 19))) for n in range(100)]
    writer = make_writer(tmp_path / "train", Progress(), mode="packed")
    for number, document in enumerate(documents):
        half = len(document) // 2  # in two records
        for part, ids in enumerate((document[:half], document[half:])):
            writer.add((number, part), starts_document=part == 0, ids=np.array(ids, dtype=np.int32))
    split = writer.close()
    rows = read_rows(tmp_path, split)
    got = [piece for row in rows for piece in pieces(row)]
    expected = [piece for document in documents for piece in cut(document)]
    assert sorted(got) == sorted(expected)
    for number, document in enumerate(documents):
        assert [i for piece in got for i in piece if i // 20 == number] == document  # in order
    assert (split.rows, split.tokens) == (len(rows), sum(map(len, rows)))
    assert writer.tokens == split.tokens
    assert split.documents == sum(map(bool, documents))
    assert max(map(len, rows)) == ROW_LENGTH
    assert len(rows) < len(got)


def test_more_open_rows_leave_less_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fills = []
    for open_rows in (1, 16):
        monkeypatch.setattr("rows.OPEN_ROWS", open_rows)
        settings = {"row_length": 510, "rows_per_shard": 1000, **MODES["packed"]}
        writer = RowWriter(tmp_path / str(open_rows), Progress(), **settings)
        rng = np.random.default_rng(0)
        for number in range(5000):
            ids = np.zeros(int(rng.lognormal(4.5, 1.0)) + 1, dtype=np.int32)
            writer.add((0, number), starts_document=True, ids=ids)
        split = writer.close()
        fills.append(split.tokens / (510 * split.rows))
    assert fills[0] < 0.9
    assert fills[1] > 0.98


@pytest.mark.parametrize("mode", MODES)
def test_a_writer_goes_on_from_every_finished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    monkeypatch.setattr("rows.OPEN_ROWS", 3)
    stream = records(9)
    writer = make_writer(tmp_path / "train", Progress(), mode=mode)
    stages: list[Progress] = []
    for place, starts_document, ids in stream:
        writer.add(place, starts_document=starts_document, ids=ids)
        if not stages or writer.progress is not stages[-1]:
            stages.append(writer.progress)
    split = writer.close()
    stages.append(writer.progress)
    assert len(stages) > 10
    for stage in stages:
        again = make_writer(tmp_path / "train", stage, mode=mode)
        for place, starts_document, ids in stream:
            if place >= stage.place:
                again.add(place, starts_document=starts_document, ids=ids)
        assert again.close() == split
        assert again.progress == writer.progress
        assert again.tokens == writer.tokens
