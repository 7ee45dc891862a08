import pickle
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch

from ds_deberta.data import DebertaTokenizer, ShardDataset
from ds_deberta.data.loader import (
    IGNORE_INDEX,
    Batch,
    MaskingCollator,
    build_train_batches,
    build_valid_batches,
)
from ds_deberta.data.sampler import EMPTY


def assert_same(batch, other):
    for field in fields(Batch):
        assert torch.equal(getattr(batch, field.name), getattr(other, field.name)), field.name


def join(batches):
    """Order the rows of batches by sample number."""
    whole = Batch(
        *(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(Batch))
    )
    order = whole.sample_numbers.argsort()
    return Batch(*(getattr(whole, field.name)[order] for field in fields(Batch)))


@pytest.fixture
def settings(data, tokenizer, masker):
    return {
        "data_dir": data.folder,
        "tokenizer": tokenizer,
        "masker": masker,
        "micro_batch_size": 4,
        "seed": 3,
    }


def train_steps(settings, count, **changes):
    batches = build_train_batches(**{"accumulation_steps": 2} | settings | changes)
    return list(islice(batches, count))


@pytest.fixture
def collator(data, masker):
    return MaskingCollator(ShardDataset(data.folder, "train", data.manifest), masker, seed=3)


def test_a_batch_is_the_rows_masked_and_padded(data, collator, masker):
    samples = [(0, 5), (1, 17), (2, 40)]
    batch = collator(samples)
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, 32)
    assert batch.labels.shape == batch.predicted_positions.shape == batch.uniforms.shape == (3, 10)
    assert batch.sample_numbers.tolist() == [0, 1, 2]
    dtypes = [getattr(batch, field.name).dtype for field in fields(Batch)]
    integer, real = torch.int64, torch.float64
    assert dtypes == [integer, torch.bool, integer, integer, real, integer]

    original = batch.original_ids()
    for i, (_, row) in enumerate(samples):
        content = data.rows["train"][row].tolist()
        n = len(content) + 2
        assert original[i].tolist() == [1, *content, 2] + [0] * (32 - n)
        assert batch.attention_mask[i].tolist() == [True] * n + [False] * (32 - n)

        used = batch.labels[i] != IGNORE_INDEX
        positions = batch.predicted_positions[i][used]
        k = len(positions)
        assert k >= 1
        assert used.tolist() == [True] * k + [False] * (10 - k)
        assert (positions.diff() > 0).all()
        assert torch.equal(batch.labels[i][used], original[i][positions])
        assert batch.predicted_positions[i][~used].eq(0).all()
        rest = torch.ones(32, dtype=torch.bool).index_fill(0, positions, False)
        assert torch.equal(batch.input_ids[i][rest], original[i][rest])
    assert batch.input_ids.eq(masker.special.mask).any()


def test_packed_rows_get_the_number_of_each_tokens_document(
    tmp_path, tokenizer, masker, write_data
):
    data = write_data(tmp_path, tokenizer, {"train": 41}, packed=True)
    collator = MaskingCollator(ShardDataset(data.folder, "train", data.manifest), masker, seed=3)
    batch = collator([(i, i) for i in range(41)] + [EMPTY])
    assert batch.documents.dtype == torch.int32
    for i, row in enumerate(data.rows["train"]):
        expected, number = [1], 1
        for token in row.tolist():
            number += token == tokenizer.special.cls
            expected.append(number)
        expected.append(number)
        assert batch.documents[i].tolist() == expected + [0] * (32 - len(expected))
    assert batch.documents[-1].eq(0).all()
    assert batch.documents.max() == 4
    assert torch.equal(batch.attention_mask, batch.documents != 0)
    # [CLS] and [SEP] within a row are as little predicted as those at its ends.
    ends = torch.tensor([tokenizer.special.cls, tokenizer.special.sep])
    assert not torch.isin(batch.labels, ends).any()
    assert torch.equal(
        torch.isin(batch.original_ids(), ends), torch.isin(batch.input_ids, ends)
    )  # nor drawn at random


def test_masks_and_uniforms_depend_on_the_seed_and_the_sample_number_alone(collator, masker):
    together = collator([(7, 3), (8, 3), (9, 12)])
    alone = collator([(8, 3)])
    for field in fields(Batch):
        assert torch.equal(getattr(together, field.name)[1:2], getattr(alone, field.name))
    assert not torch.equal(together.uniforms[0], together.uniforms[1])  # another sample number
    other_seed = MaskingCollator(collator.dataset, masker, seed=4)([(8, 3)])
    assert not torch.equal(other_seed.uniforms, alone.uniforms)
    assert_same(pickle.loads(pickle.dumps(collator))([(8, 3)]), alone)


def test_large_seeds_and_sample_numbers_and_negative_seeds_work(data, collator, masker):
    numbers = [2**40, 2**40 + 1]
    uniforms = [
        MaskingCollator(collator.dataset, masker, seed=seed)([(n, 0)]).uniforms
        for seed in (-1, 0, 2**63)
        for n in numbers
    ]
    assert len({tuple(u[0].tolist()) for u in uniforms}) == 6


def test_uniforms_are_uniform(collator):
    u = collator([(i, i % 41) for i in range(2000)]).uniforms
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * u.numel())


def test_each_step_is_accumulation_steps_batches_of_consecutive_samples(settings):
    for step, batches in enumerate(train_steps(settings, 12)):  # more than an epoch of 41 rows
        assert [len(batch.input_ids) for batch in batches] == [4, 4]
        numbers = [n for batch in batches for n in batch.sample_numbers.tolist()]
        assert numbers == list(range(step * 8, step * 8 + 8))


def test_an_epoch_reads_every_row_once(settings, data):
    whole = join([batch for step in train_steps(settings, 6) for batch in step])
    original = whole.original_ids()[:41]
    lengths = whole.attention_mask[:41].sum(1)
    seen = sorted(ids[1 : n - 1].tolist() for ids, n in zip(original, lengths, strict=True))
    assert seen == sorted(row.tolist() for row in data.rows["train"])


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "accumulation_steps"),
    [(1, 8, 1), (2, 2, 2), (2, 4, 1), (4, 1, 2), (8, 1, 1)],
)
def test_a_step_is_the_same_for_every_world_size(
    settings, world_size, micro_batch_size, accumulation_steps
):
    ranks = [
        train_steps(
            settings,
            4,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
        )
        for rank in range(world_size)
    ]
    for step, expected in enumerate(train_steps(settings, 4)):
        batches = [batch for steps in ranks for batch in steps[step]]
        assert_same(join(batches), join(expected))


def test_resume_continues_the_same_batches_with_another_world_size(settings):
    whole = train_steps(settings, 8)
    ranks = [
        train_steps(settings, 3, rank=r, world_size=2, accumulation_steps=1, consumed_samples=40)
        for r in range(2)
    ]
    for step in range(3):
        assert_same(join([ranks[0][step][0], ranks[1][step][0]]), join(whole[5 + step]))


def test_workers_change_nothing(settings):
    for expected, batches in zip(
        train_steps(settings, 6), train_steps(settings, 6, num_workers=2), strict=True
    ):
        for batch, other in zip(expected, batches, strict=True):
            assert_same(batch, other)
    valid = build_valid_batches(**settings, num_workers=2)
    for _ in range(2):  # the workers outlive a pass
        for batch, other in zip(build_valid_batches(**settings), valid, strict=True):
            assert_same(batch, other)


def test_reading_data_leaves_the_global_generator_alone(settings):
    before = torch.get_rng_state()
    train_steps(settings, 2)
    list(build_valid_batches(**settings))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_reads_every_row_once_and_fills_up_with_empty_rows(settings, data, world_size):
    ranks = [
        list(build_valid_batches(**settings, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-23 // (4 * world_size))}
    batches = [batch for batches in ranks for batch in batches]
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(4, 32)}
    whole = join(batches)
    empty = whole.sample_numbers == -1
    assert whole.sample_numbers[~empty].tolist() == list(range(23))
    for ids, mask, row in zip(
        whole.original_ids()[~empty], whole.attention_mask[~empty], data.rows["valid"], strict=True
    ):
        assert ids[mask].tolist() == [1, *row.tolist(), 2]
    assert empty.sum() == len(empty) - 23
    assert not whole.attention_mask[empty].any()
    assert whole.labels[empty].eq(IGNORE_INDEX).all()
    assert whole.original_ids()[empty].eq(0).all()


@pytest.mark.parametrize("rows", [1, 5, 22, 23, 99])
def test_a_part_of_validation_is_evenly_spaced_and_masked_as_in_the_whole(settings, rows):
    whole = join(list(build_valid_batches(**settings)))
    expected = [i * 23 // rows for i in range(rows)] if rows < 23 else list(range(23))
    for world_size in (1, 3):
        parts = [
            list(build_valid_batches(**settings, rows=rows, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in parts}) == 1
        part = join([batch for batches in parts for batch in batches])
        order = part.sample_numbers.argsort()[part.sample_numbers.eq(-1).sum() :]
        assert part.sample_numbers[order].tolist() == expected
        by_number = whole.sample_numbers.argsort()[whole.sample_numbers.eq(-1).sum() :]
        assert torch.equal(part.input_ids[order], whole.input_ids[by_number][expected])


def test_validation_masks_depend_on_the_row_and_the_seed_alone(settings):
    valid = build_valid_batches(**settings)
    first, second = join(list(valid)), join(list(valid))
    assert_same(first, second)
    ranks = [list(build_valid_batches(**settings, rank=r, world_size=2)) for r in range(2)]
    other = join([batch for batches in ranks for batch in batches])
    for field in fields(Batch):
        assert torch.equal(getattr(first, field.name)[-23:], getattr(other, field.name)[-23:])
    other_seed = join(list(build_valid_batches(**settings | {"seed": 4})))
    assert not torch.equal(first.input_ids, other_seed.input_ids)


def test_validation_uses_another_stream_than_training(settings):
    train = join([batch for step in train_steps(settings, 3) for batch in step])
    valid = join(list(build_valid_batches(**settings)))
    valid_uniforms = valid.uniforms[valid.sample_numbers >= 0][:20]
    assert not torch.isin(valid_uniforms, train.uniforms).any()


def test_to_moves_every_tensor(collator):
    moved = collator([(0, 0)]).to("meta")
    assert all(getattr(moved, field.name).device.type == "meta" for field in fields(Batch))


def test_a_longer_run_pads_the_rows_of_shorter_data(settings, masker):
    longer = replace(masker, max_seq_length=64)
    (batch,) = train_steps(settings | {"masker": longer}, 1, accumulation_steps=1)[0]
    assert batch.input_ids.shape == (4, 64)
    assert not batch.attention_mask[:, 32:].any()


@pytest.mark.parametrize("build", [build_train_batches, build_valid_batches])
def test_rows_too_long_for_the_run_are_refused_at_build_time(settings, masker, build):
    settings["masker"] = replace(masker, max_seq_length=31)
    if build is build_train_batches:
        settings["accumulation_steps"] = 1
    with pytest.raises(ValueError, match=r"at least that of the data in .*, 32; got 31"):
        build(**settings)


def test_another_vocabulary_is_refused(settings, tmp_path, train_vocabulary):
    path = train_vocabulary(tmp_path / "other.model", control_symbols=["[MASK]"])
    with pytest.raises(ValueError, match=r"other\.model is another. Use .*spm\.model"):
        build_valid_batches(**settings | {"tokenizer": DebertaTokenizer(path)})


def test_a_split_without_rows_is_refused(settings, tmp_path, tokenizer, write_data):
    data = write_data(tmp_path / "empty", tokenizer, {"train": 0, "valid": 1})
    with pytest.raises(ValueError, match=r"'train' of .* must have at least one row"):
        train_steps(settings | {"data_dir": data.folder}, 1)
