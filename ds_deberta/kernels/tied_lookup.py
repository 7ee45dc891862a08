"""A lookup in a table that a head multiplies with as well: one gradient, not the sum of two tables.

Shapes: B batch, L length, E hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.kernels.table_gradient import TableGradient


def tied_lookup(
    weight: Tensor,  # [V, E]
    ids: Tensor,  # [B, L]
    padding_idx: int | None,
    table_gradient: TableGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rows of the ids, [B, L, E], and the table for the head, [V, E].

    Args:
        weight: The table.
        ids: The rows to look up.
        padding_idx: A row that the lookup gives no gradient, as in `nn.Embedding`.
        table_gradient: Gets the rows' gradient where it got the head's.
    """
    padding_idx = -1 if padding_idx is None else padding_idx
    return _TiedLookup.apply(weight, ids, padding_idx, table_gradient)


class _TiedLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        padding_idx: int,
        table_gradient: TableGradient | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.table_gradient = weight.shape, padding_idx, table_gradient
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        grad_rows, grad_table = grad_outputs  # the head made the second one for us alone
        (ids,) = ctx.saved_tensors
        if grad_rows is None:
            return grad_table, None, None, None
        if grad_table is None and ctx.table_gradient is not None:
            grad_rows = grad_rows.masked_fill((ids == ctx.padding_idx)[..., None], 0.0)
            ctx.table_gradient.add_rows(ids.flatten(), grad_rows.flatten(0, -2))
            return None, None, None, None
        if grad_table is None:
            grad_table = grad_rows.new_zeros(ctx.shape)
        if grad_rows.device.type == "cpu":
            grad_rows = grad_rows.masked_fill((ids == ctx.padding_idx)[..., None], 0.0)
            grad_table.index_add_(0, ids.flatten(), grad_rows.flatten(0, -2))
        else:  # where that would add in any order
            grad_table += torch.ops.aten.embedding_dense_backward(
                grad_rows, ids, len(grad_table), ctx.padding_idx, False
            )
        return grad_table, None, None, None
