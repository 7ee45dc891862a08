"""Which row is read when: a shuffled order that is a pure function of the seed and a number.

The samples of a run are numbered 0, 1, 2, ...; every `num_rows` of them make an epoch, and each
epoch has its own permutation of the rows. A permutation is computed, never stored, so starting
anywhere costs nothing, and the state of a run is one integer: how many samples it has consumed.
Ranks take turns, so that the samples of a step do not depend on how many ranks there are.
"""

from collections.abc import Iterator
from math import isqrt

ROUNDS = 3
EMPTY = (-1, -1)  # stands for "no row here" in the last batches of a validation pass


class ResumableSampler:
    """Yield (sample_number, row) for one rank, for ever, from `consumed_samples` on."""

    def __init__(
        self, num_rows: int, *, seed: int, rank: int, world_size: int, consumed_samples: int = 0
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.first = consumed_samples + rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        sample_number = self.first
        while True:
            epoch, index = divmod(sample_number, self.num_rows)
            key = splitmix64(splitmix64(self.seed, 0), epoch)
            yield sample_number, permute(index, self.num_rows, key)
            sample_number += self.world_size


class PaddedSequentialSampler:
    """Yield one rank's (row, row) of a pass over all rows, once and in order.

    Every rank yields as many samples, a multiple of `batch_size`; those past the end are EMPTY.
    """

    def __init__(self, num_rows: int, *, batch_size: int, rank: int, world_size: int):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.batch_size * -(-self.num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for row in range(self.rank, len(self) * self.world_size, self.world_size):
            yield (row, row) if row < self.num_rows else EMPTY


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
