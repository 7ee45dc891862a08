from itertools import islice

import numpy as np
import pytest

from ds_deberta.data import ResumableSampler, permute
from ds_deberta.data.sampler import EMPTY, PaddedSequentialSampler, SkippedSamples, splitmix64


def take(count, num_rows, **settings):
    return list(islice(ResumableSampler(num_rows, **settings), count))


def test_splitmix64_gives_the_published_stream():
    # The test vector of the reference implementation: seed 1234567.
    assert [splitmix64(1234567, i) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permute_works_where_no_list_of_rows_would_fit_in_memory():
    n = 10**15
    images = [permute(i, n, 7) for i in range(1000)]
    assert len(set(images)) == 1000
    assert np.mean(images) / n == pytest.approx(0.5, abs=5 / np.sqrt(12 * 1000))


def test_permute_looks_random():
    n = 4097
    image = np.array([permute(i, n, 3) for i in range(n)])
    sigma = 1 / np.sqrt(n - 1)  # of the rank correlation of independent orders
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 5 * sigma
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 * sigma
    assert (image == np.arange(n)).sum() <= 10  # fixed points: 1 on average, Poisson
    # Neighbours do not keep a common distance: no step between successive rows is frequent.
    assert np.unique(np.diff(image) % n, return_counts=True)[1].max() <= 10


def test_permute_sends_each_index_anywhere_with_equal_chance():
    n, keys = 7, 7000
    for index in range(n):
        counts = np.bincount([permute(index, n, key) for key in range(keys)], minlength=n)
        assert np.abs(counts - keys / n).max() < 5 * np.sqrt(keys / n * (1 - 1 / n))


def test_every_epoch_reads_every_row_once_in_another_order():
    samples = take(300, 100, seed=1, rank=0, world_size=1)
    assert [number for number, _ in samples] == list(range(300))
    epochs = [tuple(row for _, row in samples[i : i + 100]) for i in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len(set(epochs)) == 3


def test_another_seed_gives_another_order():
    orders = [take(100, 100, seed=seed, rank=0, world_size=1) for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert orders[0] == take(100, 100, seed=1, rank=0, world_size=1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_order_of_one_process(world_size):
    alone = take(120, 50, seed=5, rank=0, world_size=1)
    ranks = [
        take(120 // world_size, 50, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert [sample for turn in zip(*ranks, strict=True) for sample in turn] == alone


@pytest.mark.parametrize("consumed", [1, 49, 50, 137])
def test_resuming_at_k_is_skipping_k(consumed):
    whole = take(200, 50, seed=5, rank=0, world_size=1)
    rest = take(200 - consumed, 50, seed=5, rank=0, world_size=1, consumed_samples=consumed)
    assert rest == whole[consumed:]


def test_four_ranks_continue_the_order_of_two():
    alone = take(80, 50, seed=5, rank=0, world_size=1)
    ranks = [take(20, 50, seed=5, rank=rank, world_size=2) for rank in range(2)]
    ranks += [
        take(10, 50, seed=5, rank=rank, world_size=4, consumed_samples=40) for rank in range(4)
    ]
    assert sorted(sample for samples in ranks for sample in samples) == alone


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "world_size"), [(23, 4, 2), (24, 4, 2), (1, 4, 3), (5, 1, 1)]
)
def test_a_sequential_pass_reads_every_row_once_in_order(num_rows, batch_size, world_size):
    samplers = [
        PaddedSequentialSampler(num_rows, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(samples) for samples in ranks] == [len(sampler) for sampler in samplers]
    assert all(len(samples) % batch_size == 0 for samples in ranks)
    turns = [sample for turn in zip(*ranks, strict=True) for sample in turn]
    assert turns[:num_rows] == [(row, row) for row in range(num_rows)]
    assert turns[num_rows:] == [EMPTY] * (len(turns) - num_rows)
    assert len(turns) - num_rows < batch_size * world_size


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("consumed", [0, 7, 12, 30])
def test_skipped_samples_are_left_out_and_the_others_stay(world_size, consumed):
    """Against all samples with those crossed out, whatever the cut and the place to go on."""
    skipped = SkippedSamples("12-14,3-3,40-99,98-120")
    crossed_out = {3, *range(12, 15), *range(40, 121)}
    every = ResumableSampler(50, seed=5, rank=0, world_size=1)
    left = ((n, row) for n, row in every if n >= consumed and n not in crossed_out)
    expected = list(islice(left, 60))
    ranks = [
        islice(
            ResumableSampler(
                50,
                seed=5,
                rank=rank,
                world_size=world_size,
                consumed_samples=consumed,
                skipped=skipped,
            ),
            60 // world_size,
        )
        for rank in range(world_size)
    ]
    assert [sample for turn in zip(*ranks, strict=True) for sample in turn] == expected
    assert [skipped.nth(n, consumed) for n in range(60)] == [number for number, _ in expected]


@pytest.mark.parametrize("text", ["5", "9-3", "1-2,", "-3", "1-2;4-5", "a-b", "1.5-3"])
def test_what_is_no_range_of_samples_is_refused(text):
    with pytest.raises(ValueError, match=r"skip_samples must be A-B\[,C-D"):
        SkippedSamples(text)
