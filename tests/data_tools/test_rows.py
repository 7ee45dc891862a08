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


def make_writer(folder: Path, progress: Progress, *, apart: bool) -> RowWriter:
    return RowWriter(
        folder,
        progress,
        row_length=ROW_LENGTH,
        rows_per_shard=ROWS_PER_SHARD,
        keep_documents_apart=apart,
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


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_all_ids_in_order(tmp_path: Path, seed: int, apart: bool):
    writer = make_writer(tmp_path / "train", Progress(), apart=apart)
    documents: list[list[int]] = []
    for place, starts_document, ids in records(seed):
        if starts_document:
            documents.append([])
        documents[-1] += ids.tolist()
        writer.add(place, starts_document=starts_document, ids=ids)
    split = writer.close()
    joined = [i for document in documents for i in document]
    expected = [row for document in documents for row in cut(document)] if apart else cut(joined)
    assert read_rows(tmp_path, split) == expected
    assert (split.rows, split.tokens) == (len(expected), len(joined))
    assert split.documents == sum(map(bool, documents))
    assert writer.progress.begun == len(documents)
    assert [shard.rows for shard in split.shards[:-1]] == [ROWS_PER_SHARD] * (len(split.shards) - 1)


@pytest.mark.parametrize("apart", [False, True])
def test_a_writer_goes_on_from_every_finished_shard(tmp_path: Path, apart: bool):
    stream = records(9)
    writer = make_writer(tmp_path / "train", Progress(), apart=apart)
    stages: list[Progress] = []
    for place, starts_document, ids in stream:
        writer.add(place, starts_document=starts_document, ids=ids)
        if not stages or writer.progress is not stages[-1]:
            stages.append(writer.progress)
    split = writer.close()
    stages.append(writer.progress)
    assert len(stages) > 10
    for stage in stages:
        again = make_writer(tmp_path / "train", stage, apart=apart)
        for place, starts_document, ids in stream:
            if place >= stage.place:
                again.add(place, starts_document=starts_document, ids=ids)
        assert again.close() == split
        assert again.progress == writer.progress
        assert again.tokens == writer.tokens
