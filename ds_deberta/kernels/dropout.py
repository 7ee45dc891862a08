"""Dropout that is cheap on a CPU as well.

torch draws one Bernoulli number per element there, in one thread: a tenth of a training step. Here
one 64-bit draw serves eight elements: four with its 16-bit words, four with the words half-way
between these. A mask has a generator of its own, with a seed from torch's. Two elements that share
a byte are all but independent, for it is the high byte of one and the low byte of the other: their
correlation is 2**-8 at most.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 2**16
_SEEDS = 2**32  # the generator uses no more of one


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
    seed = torch.randint(_SEEDS, (1,))
    keep = torch.ops.ds_deberta.keep_mask.default(seed, shape, dropped)
    return keep, 1.0 if dropped == _LEVELS else _LEVELS / (_LEVELS - dropped)


def _draw(seed: Tensor, shape: Sequence[int], dropped: int) -> Tensor:
    """Make a mask that is 0 with probability dropped / 2**16, else 1."""
    if dropped == _LEVELS:
        return torch.zeros(shape, dtype=torch.uint8)
    count = math.prod(shape)
    draws = torch.empty(2, (count + 7) // 8, dtype=torch.int64)
    generator = torch.Generator().manual_seed(int(seed.item()))
    drawn = draws[0].random_(-(2**63), None, generator=generator)
    torch.bitwise_xor(drawn >> 8, drawn << 56, out=draws[1])  # turned by a byte
    levels = draws.view(torch.int16).flatten()[:count].view(shape)  # -2**15 to 2**15 - 1
    keep = torch.empty(shape, dtype=torch.uint8)
    return torch.ge(levels, dropped - _LEVELS // 2, out=keep)


# An operator, for torch.compile does not follow a draw in place: it calls this as it is. A function
# of its arguments alone, the seed among them, for a compiler makes one of two equal calls. Defined
# piece by piece, for torch.library.custom_op imports that compiler, 0.14 GiB.
torch.library.define(
    "ds_deberta::keep_mask", "(Tensor seed, SymInt[] shape, int dropped) -> Tensor"
)
torch.library.impl("ds_deberta::keep_mask", "CPU", _draw)


@torch.library.register_fake("ds_deberta::keep_mask")
def _(seed: Tensor, shape: Sequence[int], dropped: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)
