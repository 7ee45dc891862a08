"""Which row is read when: a shuffled order that is a pure function of the seed and a number.

The samples of a run are numbered 0, 1, 2, ...; every `num_rows` of them make an epoch, and each
epoch has its own permutation of the rows. A permutation is computed, never stored, so starting
anywhere costs nothing, and the state of a run is one integer: how many samples it has consumed.
Ranks take turns, so that the samples of a step do not depend on how many ranks there are.
Numbers that a run is told to pass over are left out; the others keep their numbers and order.
"""

import re
from collections.abc import Iterator
from itertools import count
from math import isqrt

ROUNDS = 3
EMPTY = (-1, -1)  # stands for "no row here" in the last batches of a validation pass


class SkippedSamples:
    """The sample numbers that are never trained on: "A-B[,C-D...]", the ends included.

    Raises:
        ValueError: anything else.
    """

    def __init__(self, text: str = ""):
        ranges: list[tuple[int, int]] = []
        for part in text.split(",") if text else []:
            match = re.fullmatch(r"(\d+)-(\d+)", part)
            if match is None or int(match[1]) > int(match[2]):
                raise ValueError(
                    f"skip_samples must be A-B[,C-D...], numbers of samples from A to B, "
                    f"got {text!r}"
                )
            ranges.append((int(match[1]), int(match[2])))
        self._ranges: list[tuple[int, int]] = []  # ascending, none touches the next
        for first, last in sorted(ranges):
            if self._ranges and first <= self._ranges[-1][1] + 1:
                first, before = self._ranges.pop()
                last = max(last, before)
            self._ranges.append((first, last))

    def nth(self, n: int, start: int) -> int:
        """Return the n-th number, from 0, of those that remain from `start` on."""
        number = start + n
        for first, last in self._ranges:
            if last >= start and first <= number:
                number += last - max(first, start) + 1
        return number


class ResumableSampler:
    """Yield (sample_number, row) for one rank, for ever, from the number `consumed_samples` on."""

    def __init__(
        self,
        num_rows: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        consumed_samples: int = 0,
        skipped: SkippedSamples | None = None,
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.consumed_samples = consumed_samples
        self.skipped = skipped or SkippedSamples()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for n in count(self.rank, self.world_size):
            sample_number = self.skipped.nth(n, self.consumed_samples)
            epoch, index = divmod(sample_number, self.num_rows)
            key = splitmix64(splitmix64(self.seed, 0), epoch)
            yield sample_number, permute(index, self.num_rows, key)


class PaddedSequentialSampler:
    """Yield one rank's (row, row) of a pass over all rows, or `used` of them, once and in order.

    Those that are used lie evenly spaced, and are the same for any number of ranks. Every rank
    yields as many samples, a multiple of `batch_size`; those past the end are EMPTY.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        used: int | None = None,
    ):
        self.num_rows = num_rows
        self.used = num_rows if used is None else min(used, num_rows)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.batch_size * -(-self.used // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for i in range(self.rank, len(self) * self.world_size, self.world_size):
            row = i * self.num_rows // self.used
            yield (row, row) if i < self.used else EMPTY


def permute(index: int, n: int, key: int) -> int:
    """Return where a pseudo-random permutation of range(n) sends `index`.

    A Feistel network: the index is a cell of a nearly square table, and row and column are
    shifted in turn by a hash of the other, which can always be undone. The table may be a little
    larger than n; whoever lands outside walks on until inside, which keeps it a permutation.
    """
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    while True:
        row, column = divmod(index, columns)
        for round_ in range(0, 2 * ROUNDS, 2):
            row = (row + splitmix64(key, column * 2 * ROUNDS + round_)) % rows
            column = (column + splitmix64(key, row * 2 * ROUNDS + round_ + 1)) % columns
        index = row * columns + column
        if index < n:
            return index


def splitmix64(seed: int, position: int) -> int:
    """Return number `position` of the splitmix64 random stream of `seed`, in [0, 2^64)."""
    mask = 0xFFFF_FFFF_FFFF_FFFF
    x = (seed + 0x9E37_79B9_7F4A_7C15 * (position + 1)) & mask
    x = (x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB & mask
    return x ^ (x >> 31)
