"""Cut a split's stream of token ids into rows, and go on after the last shard of an earlier run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_deberta.data.shards import ShardInfo, ShardWriter, SplitInfo

Place = tuple[int, int]  # number of the input file, number of the record in it

OPEN_ROWS = 16  # that wait for more documents; the more, the less padding


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How much of the input a split's finished shards hold.

    Attributes:
        place: The last record in them.
        ids: As many of its ids are in them.
        begun: Documents begun.
        documents: Those of them with at least one id.
        shards: The shards.
        open_rows: Ids up to there that are not in them: rows that wait for more documents.
    """

    place: Place = (0, -1)
    ids: int = 0
    begun: int = 0
    documents: int = 0
    shards: tuple[ShardInfo, ...] = ()
    open_rows: tuple[tuple[int, ...], ...] = ()


class RowWriter:
    """Write a split's rows of `row_length` ids; the last one (or a document's last) may be shorter.

    With a `separator`, a document's last piece shares a row with others, the separator between
    them: it goes into the fullest open row that has room for it. Where none has, it opens a row,
    and of more than OPEN_ROWS the fullest is written.

    Attributes:
        progress: What is on disk; another writer can go on from it.
        tokens: Number of ids, separators included, on disk or not.
    """

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        *,
        row_length: int,
        rows_per_shard: int,
        keep_documents_apart: bool,
        separator: tuple[int, ...] | None = None,
    ):
        self.progress = progress
        self.row_length = row_length
        self.keep_documents_apart = keep_documents_apart
        self._separator = None if separator is None else np.array(separator, dtype=np.int32)
        self._open = [np.array(row, dtype=np.int32) for row in progress.open_rows]
        self.tokens = sum(shard.tokens for shard in progress.shards) + sum(map(len, self._open))
        self._place, self._ids = progress.place, progress.ids
        self._begun, self._documents = progress.begun, progress.documents
        self._is_counted = True  # the last document, among those with an id
        self._row: list[np.ndarray] = []
        self._row_ids = 0
        self._earlier = progress.shards
        self._writer = ShardWriter(
            folder, rows_per_shard=rows_per_shard, first_shard=len(progress.shards)
        )

    def add(self, place: Place, *, starts_document: bool, ids: np.ndarray) -> None:
        """Add the ids of one record. After a restart the first one is `progress.place`, again."""
        if place == self._place:
            ids = ids[self._ids :]
        else:
            if starts_document:
                self._end_document()
                self._begun += 1
                self._is_counted = False
            self._place, self._ids = place, 0
        if len(ids) and not self._is_counted:
            self._documents += 1
            self._is_counted = True
        self.tokens += len(ids)
        while len(ids):
            part = ids[: self.row_length - self._row_ids]
            self._row.append(part)
            self._row_ids += len(part)
            self._ids += len(part)
            ids = ids[len(part) :]
            if self._row_ids == self.row_length:
                self._end_row()

    def close(self) -> SplitInfo:
        """Write what is left, and return what the split holds."""
        self._end_document()
        self._end_row()
        while self._open:
            self._write(self._open.pop(0))
        self._writer.close()
        self._note_progress()
        shards = self.progress.shards
        return SplitInfo(
            rows=sum(shard.rows for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            documents=self._documents,
            shards=shards,
        )

    def _end_document(self) -> None:
        if not self._row:
            return
        if self._separator is not None:
            self._pack(self._take_row(), self._separator)
        elif self.keep_documents_apart:
            self._end_row()

    def _pack(self, piece: np.ndarray, separator: np.ndarray) -> None:
        """Put a document's last piece into an open row."""
        lengths = [len(row) for row in self._open]
        room = self.row_length - len(separator) - len(piece)
        fitting = [length for length in lengths if length <= room]
        if fitting:
            number = lengths.index(max(fitting))
            self._open[number] = np.concatenate([self._open[number], separator, piece])
            self.tokens += len(separator)
            return
        self._open.append(piece)
        if len(self._open) > OPEN_ROWS:
            lengths.append(len(piece))
            self._write(self._open.pop(lengths.index(max(lengths))))

    def _end_row(self) -> None:
        if self._row:
            self._write(self._take_row())

    def _take_row(self) -> np.ndarray:
        row = np.concatenate(self._row) if len(self._row) > 1 else self._row[0]
        self._row, self._row_ids = [], 0
        return row

    def _write(self, row: np.ndarray) -> None:
        if self._writer.write(row):
            self._note_progress()

    def _note_progress(self) -> None:
        self.progress = Progress(
            place=self._place,
            ids=self._ids,
            begun=self._begun,
            documents=self._documents,
            shards=(*self._earlier, *self._writer.shards),
            open_rows=tuple(tuple(row.tolist()) for row in self._open),
        )
