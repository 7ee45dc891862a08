"""A model's files: any number of ranks write them, any reader of safetensors reads them."""

import errno
import hashlib
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ds_deberta import model_state
from ds_deberta.model_state import ModelState, copy_shares, gather_shares, read_shards, write_shares
from tests.checkpoints import tensors

SHAPES = {"table": (50, 8), "odd": (7, 3), "bias": (8,), "norm": (1,), "zero": (0,)}


def example() -> ModelState:
    generator = torch.Generator().manual_seed(0)
    kinds = ("weights", "exp_avg")
    values = {
        (kind, name): torch.randn(shape, generator=generator)
        for kind in kinds
        for name, shape in SHAPES.items()
    }
    values["weights", "bias"][0] = -0.0
    return ModelState(
        shapes={"weights": SHAPES, "exp_avg": {name: SHAPES[name] for name in ("table", "odd")}},
        tensor=lambda kind, name: values[kind, name],
        numbers={"step": 3},
    )


def write(state: ModelState, folder: Path, rank: int, world_size: int) -> dict:
    shares = gather_shares(state, rank=rank, world_size=world_size, copies=False)
    return write_shares(shares, folder)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_what_was_written_is_read_whatever_the_number_of_ranks(tmp_path: Path, world_size: int):
    state = example()
    files = {}
    for rank in range(world_size):
        files |= write(state, tmp_path, rank, world_size)
    assert files.keys() == {path.name for path in tmp_path.iterdir()}
    for name, facts in files.items():
        content = (tmp_path / name).read_bytes()
        assert (facts["size"], facts["sha256"]) == (
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        found = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / name).items()}
        assert facts["tensors"] == found
    read = read_shards(tmp_path, {"step": 3})
    assert (read.shapes, read.numbers) == (state.shapes, state.numbers)
    for kind, shapes in state.shapes.items():
        assert tensors(tmp_path, kind).keys() == shapes.keys()
        for name in shapes:
            expected = state.tensor(kind, name)
            assert torch.equal(
                read.tensor(kind, name).view(torch.int32), expected.view(torch.int32)
            )


def test_shares_are_about_equal(tmp_path: Path):
    shapes = {f"layer.{i}": (8 * i + 8, 32) for i in range(40)}
    state = ModelState({"weights": shapes}, lambda _, name: torch.zeros(shapes[name]), {})
    sizes = [sum(f["size"] for f in write(state, tmp_path, rank, 4).values()) for rank in range(4)]
    assert max(sizes) < 1.05 * min(sizes)
    assert state.num_bytes() < sum(sizes) < 1.1 * state.num_bytes()


def test_no_more_than_one_tensor_is_held_while_training_waits(tmp_path: Path):
    shapes = {name: shape for name, shape in SHAPES.items() if shape != (0,)}
    held: list[weakref.ref] = []

    def tensor(_: str, name: str) -> torch.Tensor:
        assert not [each for each in held if each() is not None]
        made = np.ones(SHAPES[name], np.float32)
        held.append(weakref.ref(made))
        return torch.from_numpy(made)  # which holds it

    write(ModelState({"weights": shapes, "exp_avg": shapes}, tensor, {}), tmp_path, 0, 1)
    assert len(held) == 2 * len(shapes)


def test_a_rank_that_can_not_write_still_takes_part(monkeypatch, tmp_path: Path):
    """The others would wait for it for ever: each `tensor` is a collective."""
    state = example()
    asked: list[tuple[str, str]] = []

    def tensor(kind: str, name: str) -> torch.Tensor:
        asked.append((kind, name))
        return state.tensor(kind, name)

    counted = ModelState(state.shapes, tensor, {})
    write(counted, tmp_path, 1, 2)
    expected, asked[:] = list(asked), []

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_state.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write(counted, tmp_path, 1, 2)
    assert asked == expected
    assert len(asked) == 7

    asked.clear()
    with pytest.raises(FileNotFoundError):
        write(counted, tmp_path / "nowhere", 0, 2)
    assert asked == expected


def test_a_copy_is_written_as_it_was_whatever_training_does_meanwhile(tmp_path: Path):
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    state = ModelState({"weights": SHAPES}, lambda _, name: values[name], {})
    expected = {name: value.clone() for name, value in values.items()}
    shares = copy_shares(gather_shares(state, rank=0, world_size=1, copies=True))
    for value in values.values():
        value.zero_()
    write_shares(shares, tmp_path)
    found = tensors(tmp_path, "weights")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
