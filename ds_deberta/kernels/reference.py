"""Disentangled attention in plain torch: the definition of correct, and what a CPU trains with.

    scores[i, j] = scale * (q_i . k_j + q_i . pos_key[slots[i - j]] + k_j . pos_query[slots[i - j]])

Shapes: B batch, H heads, L queries, M keys, D head size, R rows of a position table, N positions
that `slots` covers. Heads come first inside, so that one product with a position table serves the
whole batch and no table is copied for each sample.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.kernels.dropout import dropout

AttentionFn = Callable[..., Tensor]
"""A function with the signature and the meaning of `disentangled_attention`."""

BLOCK_ROWS = 128
"""Rows that share one product with a position table: fewer waste less of it, but make it slow."""


def disentangled_attention(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, H, M, D]
    v: Tensor,  # [B, H, M, D]
    pos_key: Tensor | None,  # [H, R, D]
    pos_query: Tensor | None,  # [H, R, D]
    *,
    slots: Tensor | None,  # [2 * N - 1]
    key_mask: Tensor,  # [B, M]
    query_positions: Tensor | None = None,  # [B, L]
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend by content and relative position.

    Products are in the dtype of the input, their sum and the softmax in fp32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        pos_key: Keys of the relative positions (c2p); None switches the term off.
        pos_query: Queries of the relative positions (p2c); None switches the term off.
        slots: Row of the position tables for each delta = query position - key position, at index
            delta + N - 1. None when both tables are.
        key_mask: True where a key is attended. A row that has no key at all gives zeros.
        query_positions: Where the queries sit; None: query i sits at position i, and L == M.
        scale: Factor of the sum of all terms.
        dropout_p: Dropout of the attention probabilities.

    Returns:
        [B, H, L, D]
    """
    q, k, v = (states.transpose(0, 1) for states in (q, k, v))  # [H, B, L or M, D]
    scores = _at_least_fp32(q @ k.transpose(-1, -2))  # [H, B, L, M]
    if slots is not None and query_positions is None:
        middle, reach = slots.shape[0] // 2, q.shape[2] - 1
        slots = slots[middle - reach : middle + reach + 1]  # [2 * L - 1]
        if pos_key is not None:  # along a row of q, delta falls; along a row of k, it rises
            scores.add_(_aligned_scores(q, pos_key, slots.flip(0)))
        if pos_query is not None:
            scores.add_(_aligned_scores(k, pos_query, slots).transpose(-1, -2))
    elif slots is not None and query_positions is not None:
        keys = torch.arange(k.shape[2], device=k.device)
        rows = slots[query_positions[..., None] - keys + slots.shape[0] // 2]  # [B, L, M]
        if pos_key is not None:
            scores.add_(_gathered_scores(q, pos_key, rows))
        if pos_query is not None:
            scores.add_(_gathered_scores(k, pos_query, rows.transpose(-1, -2)).transpose(-1, -2))
    penalty = torch.zeros(key_mask.shape, dtype=scores.dtype, device=scores.device)
    penalty = penalty.masked_fill(~key_mask, torch.finfo(scores.dtype).min)  # [B, M]
    probs = scores.mul_(scale).add_(penalty[:, None]).softmax(-1).to(v.dtype)  # [H, B, L, M]
    if dropout_p > 0.0:
        probs = dropout(probs, dropout_p)
    context = (probs @ v) * key_mask.any(-1)[:, None, None]  # [H, B, L, D]
    return context.transpose(0, 1)


def _aligned_scores(states: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """Score every row i against every column j: states_i . table[slots[L - 1 + j - i]].

    With the table in the order of `slots`, row i of one product holds its L scores side by side,
    one column further left than row i - 1. Reading the product with a row stride one short of its
    width lines them up: nothing is gathered, and the backward scatters nothing.

    Args:
        states: [H, B, L, D]
        table: [H, R, D]
        slots: [2 * L - 1]

    Returns:
        [H, B, L, L]
    """
    heads, batch, length, size = states.shape
    blocks = math.gcd(max(1, length // BLOCK_ROWS), length)
    rows = length // blocks
    width = length + rows  # one more than is read: it makes length 1 no special case
    windows = F.pad(slots, (0, 1)).unfold(0, width, rows).flip(0)  # [blocks, width]
    # An embedding, for its backward sums repeated slots fast and in a fixed order; here in fp32.
    ordered = F.embedding(windows, _at_least_fp32(table).transpose(0, 1).flatten(1)).to(table.dtype)
    ordered = ordered.view(blocks, width, heads, size).permute(2, 0, 3, 1)  # [H, blocks, D, width]
    states = states.unflatten(2, (blocks, rows)).transpose(1, 2)  # [H, blocks, B, rows, D]
    states = states.flatten(2, 3).flatten(0, 1)  # [H*blocks, B*rows, D]
    product = states @ ordered.flatten(0, 1)  # [H*blocks, B*rows, width]
    block = batch * rows * width
    aligned = product.as_strided(
        (heads, batch, blocks, rows, length),
        (blocks * block, rows * width, block, width - 1, 1),
        rows - 1,
    )
    return aligned.reshape(heads, batch, length, length)


def _gathered_scores(states: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Score state i against row rows[i, j] of the table, for every j.

    Args:
        states: [H, B, I, D]
        table: [H, R, D]
        rows: [B, I, J]

    Returns:
        [H, B, I, J]
    """
    product = states.flatten(1, 2) @ table.transpose(-1, -2)  # [H, B*I, R]
    product = product.unflatten(1, states.shape[1:3])  # [H, B, I, R]
    return product.gather(-1, rows.expand(states.shape[0], *rows.shape))


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
