"""Dropout that is cheap on a CPU as well.

torch draws one Bernoulli number per element there, in one thread: a tenth of a training step. Here
a mask has a generator of its own, numpy's SFC64, with a seed from torch's, and the 16-bit words
that it draws become the mask where they are.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 2**16
_SEEDS = 2**62  # fits int64; the generator mixes all of it


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
    dropped, gain = _rounded(p)
    return values * _mask(values.shape, dropped, gain, values.dtype)


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Draw on the CPU what dropout keeps.

    Returns:
        An int16 mask that is 0 with probability p, else 1, for `keep`, and the factor that keeps
        the mean.
    """
    dropped, gain = _rounded(p)
    return _mask(shape, dropped, 1.0, torch.int16), gain


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values where an int16 mask is 1, and 0 where it is 0.

    On 16-bit floats as on integers, four times as fast as a product (on a Xeon): torch's go
    through fp32. What is dropped is 0 there even where it was not finite.
    """
    if values.dtype.itemsize == mask.dtype.itemsize:
        return (values.view(mask.dtype) * mask).view(values.dtype)
    return values * mask.to(values.dtype)


def _rounded(p: float) -> tuple[int, float]:
    """Return p in steps of 2**-16, and what the rest is scaled with."""
    dropped = round(p * _LEVELS)
    return dropped, 1.0 if dropped == _LEVELS else _LEVELS / (_LEVELS - dropped)


def _mask(shape: torch.Size, dropped: int, kept: float, dtype: torch.dtype) -> Tensor:
    seed = torch.randint(_SEEDS, (1,))
    return torch.ops.ds_deberta.dropout_mask.default(seed, shape, dropped, kept, dtype)


def _draw(
    seed: Tensor, shape: Sequence[int], dropped: int, kept: float, dtype: torch.dtype
) -> Tensor:
    """Make a mask that is 0 with probability dropped / 2**16, else `kept`: a float, or int16 1."""
    if dropped == _LEVELS:
        return torch.zeros(shape, dtype=dtype)
    count = math.prod(shape)
    draws = np.random.SFC64(int(seed.item())).random_raw(-(-count // 4))
    levels = torch.from_numpy(draws.view(np.int16))[:count].view(shape)  # -2**15 to 2**15 - 1
    mask = levels.ge_(dropped - _LEVELS // 2)
    if dtype == mask.dtype:
        return mask
    if dtype.itemsize == mask.dtype.itemsize:
        return mask.mul_(int(torch.tensor(kept, dtype=dtype).view(mask.dtype))).view(dtype)
    return mask.to(dtype).mul_(kept)


# An operator, for torch.compile does not follow a draw in place: it calls this as it is. A function
# of its arguments alone, the seed among them, for a compiler makes one of two equal calls. Defined
# piece by piece, for torch.library.custom_op imports that compiler, 0.14 GiB.
torch.library.define(
    "ds_deberta::dropout_mask",
    "(Tensor seed, SymInt[] shape, int dropped, float kept, ScalarType dtype) -> Tensor",
)
torch.library.impl("ds_deberta::dropout_mask", "CPU", _draw)


@torch.library.register_fake("ds_deberta::dropout_mask")
def _(seed: Tensor, shape: Sequence[int], dropped: int, kept: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)
