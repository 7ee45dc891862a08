"""The gradient of a word table as what it is made of, until the update takes it block by block.

The head's part is `logits_grad.T @ states`, a product of two factors; the lookup's part is the
rows that were read. Where a step predicts few tokens the factors are far smaller than the table,
which then is neither multiplied out, nor added to, nor measured in memory.

Shapes: N rows of the head, E hidden size, V vocabulary, C ids of a piece, U ids that were read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_MEASURED_IDS = 2**13  # at a time, for the norm


class TableGradient:
    """Gathers what the uses of a table [V, E] say of its gradient in one step.

    Args:
        table: whose gradient it is.
    """

    def __init__(self, table: Tensor) -> None:
        self._height, self._width = table.shape
        self._dtype = table.dtype
        self._pieces: list[Tensor] = []  # [N, C] each, side by side: [N, V]
        self._states = table.new_empty(0, self._width)  # [N, E]
        self._ids = torch.empty(0, dtype=torch.int64, device=table.device)  # [U]
        self._rows = table.new_empty(0, self._width)  # [U, E]

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added."""
        return not self._pieces and not len(self._ids)

    def takes(self, rows: int) -> bool:
        """Whether it has place for a product of that many rows: one, of a quarter of the width.

        For more of them the norm would cost as much as is saved elsewhere.
        """
        return not self._pieces and 4 * rows <= self._width

    def add_product(self, pieces: list[Tensor], states: Tensor) -> None:
        """Add `cat(pieces, 1).T @ states`: [N, C] of ids that follow each other, and [N, E].

        Raises:
            RuntimeError: there is one already, which would be lost.
        """
        if self._pieces:
            raise RuntimeError(
                "a table's gradient in parts must come from one backward pass of one forward pass; "
                "got a second one. Update the table before it, or do not defer its gradient."
            )
        self._pieces, self._states = pieces, states.detach()

    def add_rows(self, ids: Tensor, rows: Tensor) -> None:
        """Add to the rows of the ids, [U], which may repeat, what is in [U, E]."""
        self._ids = torch.cat([self._ids, ids])
        self._rows = torch.cat([self._rows, rows.detach()])

    def clear(self) -> None:
        """Forget all of it."""
        self._pieces, self._states = [], self._rows[:0]
        self._ids, self._rows = self._ids[:0], self._rows.new_empty(0, self._width)

    def norm(self) -> Tensor:
        """Its Euclidean norm, 0-d, from products among the factors alone."""
        self._sum_repeated()
        square = self._rows.square().sum()
        if not self._pieces:
            return square.sqrt()
        states, read = self._states.to(self._dtype), []
        gram = states.new_zeros(len(states), len(states))
        for start in range(0, self._height, _MEASURED_IDS):
            stop = min(start + _MEASURED_IDS, self._height)
            grads = torch.cat([part for part, _ in self._cut(start, stop)], 1).to(self._dtype)
            gram.addmm_(grads, grads.T)
            read.append(grads[:, self._ids[self._within(start, stop)] - start])
        square = square + (gram * (states @ states.T)).sum()
        square = square + 2 * (torch.cat(read, 1) * (states @ self._rows.T)).sum()
        return square.clamp(min=0.0).sqrt()

    def blocks(self, height: int) -> Iterator[tuple[int, Tensor]]:
        """Yield it as (first row, [height or what is left, E]), each in the same memory."""
        self._sum_repeated()
        memory = self._rows.new_zeros(min(height, self._height), self._width)
        for start in range(0, self._height, height):
            stop = min(start + height, self._height)
            block = memory[: stop - start]
            for part, offset in self._cut(start, stop):
                rows = block[offset : offset + part.shape[1]]
                if part.dtype == rows.dtype:
                    torch.mm(part.T, self._states, out=rows)
                else:
                    rows.copy_(part.T @ self._states)
            here = self._within(start, stop)
            places = self._ids[here] - start
            block.index_add_(0, places, self._rows[here])
            yield start, block
            if not self._pieces:
                block.index_fill_(0, places, 0.0)

    def _cut(self, start: int, stop: int) -> Iterator[tuple[Tensor, int]]:
        """Yield what of the pieces lies from `start` to `stop`, and how far after `start`."""
        first = 0
        for piece in self._pieces:
            last = first + piece.shape[1]
            low, high = max(first, start), min(last, stop)
            if low < high:
                yield piece[:, low - first : high - first], low - start
            first = last

    def _sum_repeated(self) -> None:
        """Bring the rows that were read into rising order, each once."""
        size = (self._height, self._width)
        rows = torch.sparse_coo_tensor(
            self._ids[None], self._rows, size, check_invariants=False
        ).coalesce()
        self._ids, self._rows = rows.indices()[0], rows.values()

    def _within(self, start: int, stop: int) -> slice:
        """Where ids from `start` to before `stop` are."""
        ends = torch.tensor([start, stop], device=self._ids.device)
        return slice(*torch.searchsorted(self._ids, ends).tolist())
