"""Disentangled attention in plain torch: the definition of correct.

    scores[i, j] = scale * (q_i . k_j + q_i . pos_key[slots[i - j]] + k_j . pos_query[slots[i - j]])

Shapes: B batch, H heads, L queries, M keys, D head size, R rows of a position table, N positions
that `slots` covers. Heads come first inside, so that one product with a position table serves the
whole batch and no table is copied for each sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ds_deberta.kernels.dropout import dropout

AttentionFn = Callable[..., Tensor]
"""A function with the signature and the meaning of `disentangled_attention`."""


def disentangled_attention(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, H, M, D]
    v: Tensor,  # [B, H, M, D]
    pos_key: Tensor | None,  # [H, R, D]
    pos_query: Tensor | None,  # [H, R, D]
    *,
    slots: Tensor | None,  # [2 * N - 1]
    documents: Tensor,  # [B, M]
    query_positions: Tensor | None = None,  # [B, L]
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend by content and relative position, within each document.

    Products are in the dtype of the input, their sum and the softmax in fp32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        pos_key: Keys of the relative positions (c2p); None switches the term off.
        pos_query: Queries of the relative positions (p2c); None switches the term off.
        slots: Row of the position tables for each delta = query position - key position, at index
            delta + N - 1. None: row delta + M - 1, which makes R = 2 * M - 1.
        documents: Which document each position of the row belongs to: 0 (or False) is padding,
            equal numbers (or True) are one document. A query attends to the keys of its own; a
            query that is padding gives zeros.
        query_positions: Where the queries sit; None: query i sits at position i, and L == M.
        scale: Factor of the sum of all terms.
        dropout_p: Dropout of the attention probabilities.

    Returns:
        [B, H, L, D]

    Raises:
        ValueError: no slots, and a position table that has not a row for each delta.
    """
    check_order(slots, pos_key, pos_query, k.shape[2])
    q, k, v = (states.transpose(0, 1) for states in (q, k, v))  # [H, B, L or M, D]
    scores = at_least_fp32(q @ k.transpose(-1, -2))  # [H, B, L, M]
    if pos_key is not None or pos_query is not None:
        keys = torch.arange(k.shape[2], device=k.device)
        queries = keys.expand(q.shape[1], -1) if query_positions is None else query_positions
        delta = queries[..., None] - keys  # [B, L, M]
        rows = delta + len(keys) - 1 if slots is None else slots[delta + slots.shape[0] // 2]
        if pos_key is not None:
            scores.add_(_gathered_scores(q, pos_key, rows))
        if pos_query is not None:
            scores.add_(_gathered_scores(k, pos_query, rows.transpose(-1, -2)).transpose(-1, -2))
    penalty, is_token = mask_scores(documents, query_positions, scores.dtype)
    probs = scores.mul_(scale).add_(penalty).softmax(-1).to(v.dtype)  # [H, B, L, M]
    if dropout_p > 0.0:
        probs = dropout(probs, dropout_p)
    return ((probs @ v) * is_token).transpose(0, 1)


def check_order(
    slots: Tensor | None, pos_key: Tensor | None, pos_query: Tensor | None, num_keys: int
) -> None:
    """Raise ValueError where no slots are given and a table can not be in the order of delta."""
    for table in (pos_key, pos_query):
        if slots is None and table is not None and table.shape[1] != 2 * num_keys - 1:
            raise ValueError(
                "without slots a position table must have a row for each delta, "
                f"{2 * num_keys - 1} for {num_keys} keys; got {table.shape[1]}. Give slots."
            )


def mask_scores(
    documents: Tensor,  # [B, M]
    query_positions: Tensor | None,  # [B, L]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Turn document numbers into what attention adds to its scores.

    Returns:
        [B, 1 or L, M] the least number of the dtype where a query does not attend, else 0.
        [B, L, 1] False where a query is padding.
    """
    own = documents if query_positions is None else documents.gather(1, query_positions)  # [B, L]
    allowed = (documents != 0)[:, None]  # [B, 1, M]
    if documents.dtype != torch.bool:
        allowed = allowed & (own[:, :, None] == documents[:, None])  # [B, L, M]
    penalty = torch.zeros(allowed.shape, dtype=dtype, device=documents.device)
    return penalty.masked_fill_(~allowed, torch.finfo(dtype).min), (own != 0)[..., None]


def at_least_fp32(values: Tensor) -> Tensor:
    """Return bf16 and fp16 values in fp32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


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
