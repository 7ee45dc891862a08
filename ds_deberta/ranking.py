"""How well scores rank replaced tokens first: AUC and average precision, in bounded memory.

Scores are counted in bins that all ranks share, so that ranks and batches add up. The edges are
what bfloat16 can hold, and the first `SAMPLE` scores of all ranks themselves: wherever scores
lie, however near to each other, few of them share a bin. Up to `SAMPLE` scores, and with scores in
bfloat16, both values are exact.
"""

import math

import torch
from torch import Tensor

from ds_deberta.distributed import gather_across_ranks, sum_across_ranks, world_size

SAMPLE = 2**16
"""Scores of all ranks together that become edges of bins."""
Scores = tuple[Tensor, Tensor, Tensor]
"""[B, L] each: scores, whether the token was replaced, and whether it counts."""


class Ranking:
    """Collects scores, which stay on their device, and says how well they rank.

    All ranks add as many batches of the same shape, in which tokens may not count. Until `SAMPLE`
    scores are there, batches are kept as they are; from then on only counts are.
    """

    def __init__(self) -> None:
        self._kept: list[Scores] = []
        self._edges: Tensor | None = None  # [bins - 1] ascending
        self._counts = torch.zeros(0)  # [2, bins] int64: tokens that were kept, and replaced
        self._not_finite = torch.zeros(0)  # 0-d int64: scores

    def add(self, scores: Scores) -> None:
        """Count a batch."""
        self._kept.append(scores)
        if sum(each[0].numel() for each in self._kept) * world_size() >= SAMPLE:
            self._count()

    def quality(self) -> tuple[float, float]:
        """AUC and average precision over all ranks. Every rank must call it. Syncs.

        NaN if nothing was replaced, or everything, or if a score is not finite.
        """
        if self._kept:
            self._count()
        if self._edges is None:
            return math.nan, math.nan
        sums = sum_across_ranks(torch.cat([self._counts.flatten(), self._not_finite[None]])).cpu()
        negatives, positives = sums[:-1].view(2, -1).double().flip(1)  # best first
        hits, misses = positives.cumsum(0), negatives.cumsum(0)
        if sums[-1] or not hits[-1] or not misses[-1]:
            return math.nan, math.nan
        # Of a bin's pairs half are in order.
        wrong = (misses - negatives / 2) @ positives
        precision = hits / (hits + misses).clamp(min=1)
        auc = 1.0 - wrong / (hits[-1] * misses[-1])
        return auc.item(), (precision @ positives / hits[-1]).item()

    def _count(self) -> None:
        """Move what is kept into the bins."""
        if self._edges is None:
            self._edges = _edges(self._kept)
            device, bins = self._edges.device, len(self._edges) + 1
            self._counts = torch.zeros(2, bins, dtype=torch.int64, device=device)
            self._not_finite = torch.zeros((), dtype=torch.int64, device=device)
        for scores, replaced, mask in self._kept:
            scores = scores.float().contiguous()
            bins = torch.bucketize(scores, self._edges) + replaced * self._counts.shape[1]
            self._counts.view(-1).index_add_(0, bins.flatten(), mask.flatten().long())
            self._not_finite += (~scores.isfinite() & mask).sum()
        self._kept.clear()


def _edges(batches: list[Scores]) -> Tensor:
    """[E] ascending; the same on all ranks."""
    counting = [
        torch.where(mask & scores.isfinite(), scores.float(), torch.inf).flatten()
        for scores, _, mask in batches
    ]
    ordered = torch.cat(counting).sort().values
    size = -(-SAMPLE // world_size())
    # Every one of them, or evenly spaced ones, without asking the device how many there are.
    chosen = torch.arange(size, device=ordered.device) * ordered.isfinite().sum() // size
    sample = gather_across_ranks(ordered[chosen])
    top_bits = torch.arange(0, 0x7F800000, 2**16, dtype=torch.int32, device=sample.device)
    positive = top_bits.view(torch.float32)
    return torch.cat([-positive, positive, sample]).sort().values
