"""Disentangled self-attention for the CPU, with its backward written out.

With a position table in the order of falling delta, row i of one product `states @ table` holds
the L scores of row i side by side, one column further left than those of row i - 1. Reading the
product with a row stride one short of its width lines them up: no score is gathered and no
gradient scattered. Blocks of rows share one product, so that little of it is computed in vain.

Shapes: B batch, H heads, L length, D head size, R rows of a position table, N positions that
`slots` covers, W columns of a product. Heads come first inside.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.kernels.dropout import keep, keep_mask
from ds_deberta.kernels.reference import (
    at_least_fp32,
    check_order,
    disentangled_attention,
    mask_scores,
)

BLOCK_ROWS = 128
"""Rows that share one product with a position table: fewer waste less of it, but make it slow."""


def cpu_attention(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, H, L, D]
    v: Tensor,  # [B, H, L, D]
    pos_key: Tensor | None,  # [H, R, D]
    pos_query: Tensor | None,  # [H, R, D]
    *,
    slots: Tensor | None,  # [2 * N - 1]
    documents: Tensor,  # [B, L]
    query_positions: Tensor | None = None,  # [B, P]
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend as `reference.disentangled_attention` does.

    It calls that for the few queries of the enhanced mask decoder, and for rows longer than a
    position table, whose shared buckets leave a gather less to multiply.
    """
    length = q.shape[2]
    check_order(slots, pos_key, pos_query, k.shape[2])
    tables = [table for table in (pos_key, pos_query) if table is not None]
    if query_positions is not None or any(length > table.shape[1] + 1 for table in tables):
        return disentangled_attention(
            *(q, k, v, pos_key, pos_query),
            slots=slots,
            documents=documents,
            query_positions=query_positions,
            scale=scale,
            dropout_p=dropout_p,
        )
    blocks = math.gcd(max(1, length // BLOCK_ROWS), length)
    if slots is not None:
        middle = slots.shape[0] // 2
        slots = slots[middle - length + 1 : middle + length]  # [2 * L - 1]
    # Along a row of q, delta falls; along a row of k, it rises.
    key_table = None if pos_key is None else _order(pos_key, slots, blocks, falls=True)
    query_table = None if pos_query is None else _order(pos_query, slots, blocks, falls=False)
    penalty, is_token = mask_scores(documents, None, at_least_fp32(q[:0]).dtype)
    q, k, v = (states.transpose(0, 1) for states in (q, k, v))  # [H, B, L, D]
    context = _SelfAttention.apply(q, k, v, key_table, query_table, penalty, scale, dropout_p)
    return (context * is_token.to(context.dtype)).transpose(0, 1)


class _SelfAttention(torch.autograd.Function):
    """softmax(scale * (content + c2p + p2c) + penalty), dropped out, times v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [H, B, L, D]
        k: Tensor,  # [H, B, L, D]
        v: Tensor,  # [H, B, L, D]
        key_table: Tensor | None,  # [H*blocks, W, D]
        query_table: Tensor | None,  # [H*blocks, W, D]
        penalty: Tensor,  # [B, 1 or L, L]
        scale: float,
        dropout_p: float,
    ) -> Tensor:  # [H, B, L, D]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        scores = at_least_fp32(q @ k.transpose(-1, -2))  # [H, B, L, L]
        if key_table is not None:
            _add_aligned(scores, _by_block(q, key_table) @ key_table.transpose(-1, -2))
        if query_table is not None:
            _add_aligned(
                scores.transpose(-1, -2), _by_block(k, query_table) @ query_table.transpose(-1, -2)
            )
        torch.add(penalty, scores, alpha=scale, out=scores)
        probs = scores.softmax(-1).to(v.dtype)  # [H, B, L, L]
        mask, ctx.gain = keep_mask(probs.shape, dropout_p) if dropout_p > 0.0 else (None, 1.0)
        ctx.save_for_backward(q, k, v, key_table, query_table, probs, mask)
        ctx.scale = scale
        return (probs if mask is None else keep(probs, mask)) @ v.mul(ctx.gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, key_table, query_table, probs, mask = ctx.saved_tensors
        grad = grad.contiguous().mul(ctx.gain)
        kept, grad_probs = probs, grad @ v.transpose(-1, -2)  # [H, B, L, L]
        if mask is not None:
            kept, grad_probs = keep(probs, mask), keep(grad_probs, mask)
        grad_v = kept.transpose(-1, -2) @ grad
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        grad_scores.mul_(ctx.scale)
        grad_q = grad_scores @ k
        grad_k = grad_scores.transpose(-1, -2) @ q
        grad_key_table = grad_query_table = None
        if key_table is not None:
            skewed = _skew(grad_scores, key_table)  # [H*blocks, B*rows, W]
            grad_q += _by_row(skewed @ key_table, q)
            grad_key_table = skewed.transpose(-1, -2) @ _by_block(q, key_table)
        if query_table is not None:
            skewed = _skew(grad_scores.transpose(-1, -2), query_table)
            grad_k += _by_row(skewed @ query_table, k)
            grad_query_table = skewed.transpose(-1, -2) @ _by_block(k, query_table)
        return grad_q, grad_k, grad_v, grad_key_table, grad_query_table, None, None, None


def _order(table: Tensor, slots: Tensor | None, blocks: int, *, falls: bool) -> Tensor:
    """Bring a position table [H, R, D] into the order in which blocks of rows meet its rows.

    Args:
        table: [H, R, D]
        slots: [2 * L - 1], which row each delta uses; None: they are in its order already.
        blocks: into how many the L rows are cut.
        falls: whether delta falls along a row, or rises.

    Returns:
        [H*blocks, W, D], W = L + L / blocks: one more than is read, so that length 1 is no special
        case.
    """
    heads, count, size = table.shape
    if slots is None and blocks == 1:
        return F.pad(table.flip(1) if falls else table, (0, 0, 0, 1))
    if slots is None:
        slots = torch.arange(count, device=table.device)
    length = (len(slots) + 1) // 2
    rows = length // blocks
    met = F.pad(slots.flip(0) if falls else slots, (0, 1))
    windows = met.unfold(0, length + rows, rows).flip(0)  # [blocks, W]
    # An embedding, for its backward sums repeated slots fast and in a fixed order; here in fp32.
    ordered = F.embedding(windows, at_least_fp32(table).transpose(0, 1).flatten(1)).to(table.dtype)
    ordered = ordered.unflatten(-1, (heads, size)).permute(2, 0, 1, 3)  # [H, blocks, W, D]
    return ordered.flatten(0, 1)


def _by_block(states: Tensor, table: Tensor) -> Tensor:
    """[H, B, L, D] -> [H*blocks, B*rows, D], for the products with [H*blocks, W, D]."""
    blocks = table.shape[0] // states.shape[0]
    states = states.unflatten(2, (blocks, -1)).transpose(1, 2)  # [H, blocks, B, rows, D]
    return states.flatten(2, 3).flatten(0, 1)


def _by_row(states: Tensor, like: Tensor) -> Tensor:
    """[H*blocks, B*rows, D] -> [H, B, L, D], the shape of `like`."""
    heads, batch, _, size = like.shape
    states = states.view(heads, -1, batch, states.shape[1] // batch, size)
    return states.transpose(1, 2).reshape(like.shape)


def _aligned(product: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """See a product [H*blocks, B*rows, W] and [H, B, L, L] scores as [H, B, blocks, rows, L]."""
    heads, batch, length, _ = scores.shape
    width = product.shape[2]
    rows = width - length
    blocks, block = length // rows, batch * rows * width
    aligned = product.as_strided(
        (heads, batch, blocks, rows, length),
        (blocks * block, rows * width, block, width - 1, 1),
        rows - 1,
    )
    return aligned, scores.unflatten(2, (blocks, rows))


def _add_aligned(scores: Tensor, product: Tensor) -> None:
    """Add the products of every row with its L positions to [H, B, L, L] scores, in place."""
    aligned, scores = _aligned(product, scores)
    scores.add_(aligned)


def _skew(scores: Tensor, table: Tensor) -> Tensor:
    """Put [H, B, L, L] scores where the product with a table [H*blocks, W, D] had them."""
    heads, batch, length, _ = scores.shape
    blocks, width = table.shape[0] // heads, table.shape[1]
    product = scores.new_zeros(heads * blocks, batch * (length // blocks), width)
    aligned, scores = _aligned(product, scores)
    aligned.copy_(scores)
    return product
