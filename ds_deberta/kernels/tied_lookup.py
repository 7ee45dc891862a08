"""A lookup in a table that a head multiplies with as well: one gradient, not the sum of two tables.

Shapes: B batch, L length, E hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def tied_lookup(
    weight: Tensor,  # [V, E]
    ids: Tensor,  # [B, L]
    padding_idx: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the rows of the ids, [B, L, E], and the table for the head, [V, E].

    Args:
        weight: The table.
        ids: The rows to look up.
        padding_idx: A row that the lookup gives no gradient, as in `nn.Embedding`.
    """
    return _TiedLookup.apply(weight, ids, -1 if padding_idx is None else padding_idx)


class _TiedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx = padding_idx
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        grad_rows, grad_table = grad_outputs  # the head made the second one for us alone
        (ids,) = ctx.saved_tensors
        if grad_rows.device.type == "cpu":
            grad_rows = grad_rows.masked_fill((ids == ctx.padding_idx)[..., None], 0.0)
            grad_table.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2))
        else:  # where that would add in any order
            grad_table += torch.ops.aten.embedding_dense_backward(
                grad_rows, ids, len(grad_table), ctx.padding_idx, False
            )
        return grad_table, None, None
