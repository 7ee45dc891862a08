"""Relative positions: which row of the relative embeddings a pair of positions uses."""

import math

import torch
from torch import Tensor

from ds_deberta.model.config import DebertaConfig


def log_bucket(distance: int, *, num_buckets: int, max_distance: int) -> int:
    """Map a signed distance to a signed bucket: exact when near, logarithmic when far.

    Distances within `num_buckets // 2` keep their own bucket; the rest, clipped to
    `max_distance - 1`, share buckets that widen with distance. As the original.

    Returns:
        The bucket, in (-num_buckets, num_buckets).
    """
    near = num_buckets // 2
    size = min(abs(distance), max_distance - 1)
    if size > near:
        share = math.log(size / near) / math.log((max_distance - 1) / near)
        size = near + math.ceil(share * (near - 1))
    return int(math.copysign(size, distance))


def slot(config: DebertaConfig, delta: int) -> int:
    """Return the row of `rel_embeddings` for delta = query position - key position."""
    if config.position_buckets > 0:
        delta = log_bucket(
            delta, num_buckets=config.position_buckets, max_distance=config.relative_reach
        )
    span = config.position_span
    return min(max(delta + span, 0), 2 * span - 1)


def slot_table(config: DebertaConfig, max_length: int) -> Tensor:
    """Return `slot` of every delta from -(max_length - 1) to max_length - 1, never falling.

    Returns:
        [2 * max_length - 1] int64
    """
    deltas = range(-(max_length - 1), max_length)
    return torch.tensor([slot(config, delta) for delta in deltas], dtype=torch.int64)
