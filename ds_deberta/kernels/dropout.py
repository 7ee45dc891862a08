"""Dropout that is cheap on a CPU as well.

torch draws one Bernoulli number per element there, in one thread: a tenth of a training step. Here
one 64-bit draw of the same generator serves eight elements: four with its 16-bit words, four with
the words half-way between these. Two elements that share a byte are all but independent, for it is
the high byte of one and the low byte of the other: their correlation is 2**-8 at most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training, as `dropout` does."""
        return dropout(input, self.p) if self.training else input


def dropout(values: Tensor, p: float) -> Tensor:
    """Zero each element with probability p and scale the rest, so that the mean stays.

    On a CPU p is rounded to a multiple of 2**-16, and the scale belongs to the rounded one.
    """
    if p == 0.0 or values.device.type != "cpu":
        return F.dropout(values, p)
    keep, gain = keep_mask(values.shape, p)
    return values * keep.to(values.dtype).mul_(gain)


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Draw on the CPU what dropout keeps.

    Returns:
        A uint8 mask (torch turns bool into floats eight times slower) that is 0 with probability p,
        else 1, and the factor that keeps the mean.
    """
    dropped = round(p * _LEVELS)
    draws = torch.empty(2, (shape.numel() + 7) // 8, dtype=torch.int64)
    drawn = draws[0].random_(-(2**63), None)
    torch.bitwise_xor(drawn >> 8, drawn << 56, out=draws[1])  # turned by a byte
    levels = draws.view(torch.int16).flatten()[: shape.numel()].view(shape)  # -2**15 to 2**15 - 1
    if dropped == _LEVELS:
        return torch.zeros(shape, dtype=torch.uint8), 1.0
    keep = torch.empty(shape, dtype=torch.uint8)
    torch.ge(levels, dropped - _LEVELS // 2, out=keep)
    return keep, _LEVELS / (_LEVELS - dropped)
