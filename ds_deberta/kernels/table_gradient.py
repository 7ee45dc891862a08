"""The gradient of a word table as what it is made of, until the update takes it block by block.

The head's part is `logits_grad @ states`, a product of two factors; the lookup's part is the rows
that were read. Where a step predicts few tokens the factors are far smaller than the table,
which then is neither multiplied out, nor added to, nor measured in memory.

Shapes: N rows of the head, E hidden size, V vocabulary, U ids that were read.
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
        self._factors: tuple[Tensor, Tensor] | None = None  # [V, N], [N, E]
        self._ids = torch.empty(0, dtype=torch.int64, device=table.device)  # [U]
        self._rows = table.new_empty(0, self._width)  # [U, E]

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added."""
        return self._factors is None and not len(self._ids)

    def takes(self, rows: int) -> bool:
        """Whether it has place for a product of that many rows: one, of a quarter of the width.

        For more of them the norm would cost as much as is saved elsewhere.
        """
        return self._factors is None and 4 * rows <= self._width

    def add_product(self, logits_grad: Tensor, states: Tensor) -> None:
        """Add `logits_grad @ states`: [V, N] and [N, E].

        Raises:
            RuntimeError: there is one already, which would be lost.
        """
        if self._factors is not None:
            raise RuntimeError(
                "a table's gradient in parts must come from one backward pass of one forward pass; "
                "got a second one. Update the table before it, or do not defer its gradient."
            )
        self._factors = logits_grad.detach(), states.detach()

    def add_rows(self, ids: Tensor, rows: Tensor) -> None:
        """Add to the rows of the ids, [U], which may repeat, what is in [U, E]."""
        self._ids = torch.cat([self._ids, ids])
        self._rows = torch.cat([self._rows, rows.detach()])

    def clear(self) -> None:
        """Forget all of it."""
        self._factors = None
        self._ids, self._rows = self._ids[:0], self._rows.new_empty(0, self._width)

    def norm(self) -> Tensor:
        """Its Euclidean norm, 0-d, from products among the factors alone."""
        self._sum_repeated()
        square = self._rows.square().sum()
        if self._factors is None:
            return square.sqrt()
        logits_grad, states = self._factors[0], self._factors[1].to(self._dtype)
        gram = states.new_zeros(len(states), len(states))
        for part in logits_grad.split(_MEASURED_IDS):
            if part.dtype == torch.float16:  # whose squares pass its range
                part = part.to(self._dtype)
            gram += part.T @ part
        square = square + (gram * (states @ states.T)).sum()
        read = logits_grad[self._ids].to(self._dtype)  # [U, N]
        square = square + 2 * (read * (self._rows @ states.T)).sum()
        return square.clamp(min=0.0).sqrt()

    def blocks(self, height: int) -> Iterator[tuple[int, Tensor]]:
        """Yield it as (first row, [height or what is left, E]), each in the same memory."""
        self._sum_repeated()
        memory = self._rows.new_zeros(min(height, self._height), self._width)
        starts = torch.arange(0, self._height + height, height, device=self._ids.device)
        ends = torch.searchsorted(self._ids, starts).tolist()
        for number, start in enumerate(range(0, self._height, height)):
            stop = min(start + height, self._height)
            block = memory[: stop - start]
            if self._factors is not None:
                logits_grad, states = self._factors[0][start:stop], self._factors[1]
                if states.dtype == block.dtype:
                    torch.mm(logits_grad, states, out=block)
                else:
                    block.copy_(logits_grad @ states)
            here = slice(ends[number], ends[number + 1])
            places = self._ids[here] - start
            block.index_add_(0, places, self._rows[here])
            yield start, block
            if self._factors is None:
                block.index_fill_(0, places, 0.0)

    def _sum_repeated(self) -> None:
        """Bring the rows that were read into rising order, each once."""
        size = (self._height, self._width)
        rows = torch.sparse_coo_tensor(
            self._ids[None], self._rows, size, check_invariants=False
        ).coalesce()
        self._ids, self._rows = rows.indices()[0], rows.values()
