"""A model in training as whole tensors and numbers, and as files.

The files of a model are safetensors, sharded for writing in parallel: KIND-RANK.safetensors holds a
share of the parameters, whole and under their public names. The kind `weights` is the model in
fp32; every other kind is a state of the optimizer, `exp_avg` for one. So the files depend neither
on the number of ranks nor on how ZeRO cuts parameters, and any reader of safetensors reads them.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

WEIGHTS = "weights"
_BYTES = 4  # of an fp32 element


@dataclass(frozen=True)
class ModelState:
    """All that training changes in a model."""

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """kind -> parameter's name -> shape."""
    tensor: Callable[[str, str], Tensor]
    """(kind, name) -> the whole tensor in fp32. Of an engine's state: every rank must call it."""
    numbers: Mapping[str, Any]
    """Counters and the like, as plain JSON."""

    def num_bytes(self, *kinds: str) -> int:
        """Bytes of its tensors in files; all kinds, or some."""
        found = [self.shapes[kind] for kind in kinds or self.shapes]
        return _BYTES * sum(math.prod(shape) for shapes in found for shape in shapes.values())


@dataclass(frozen=True)
class Share:
    """What one rank writes to one file."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]
    """Parameter's name -> shape."""
    tensors: Iterable[Tensor]
    """In that order, fp32, in CPU memory: of their own, or what is trained itself."""


def gather_shares(
    state: ModelState, *, rank: int, world_size: int, copies: bool
) -> Iterator[Share]:
    """Give a rank its shares of a model, each tensor when it is asked for.

    Each becomes a file KIND-RANK.safetensors. Every rank must go through all shares, and through
    all tensors of each; some ranks have no tensors in some.

    Args:
        state: of the model.
        rank: this one.
        world_size: how many there are.
        copies: whether training may go on while the tensors are in use.
    """
    for kind, shapes in state.shapes.items():
        rounds = _rounds(shapes, world_size)
        mine = {names[rank]: shapes[names[rank]] for names in rounds if rank < len(names)}
        file = f"{kind}-{rank:05d}.safetensors"
        yield Share(file, mine, _gather(state, kind, rounds, rank, copies))


def copy_shares(shares: Iterable[Share]) -> list[Share]:
    """Hold the tensors of shares in memory, 4 bytes an element."""
    return [replace(share, tensors=list(share.tensors)) for share in shares]


def write_shares(shares: Iterable[Share], folder: Path) -> dict[str, dict[str, Any]]:
    """Write a rank's shares to an existing folder, and on to the disk itself.

    A rank that can not write still goes through all of them, as `gather_shares` wants it.

    Returns:
        By file: its size, its sha256, and its tensors' shapes.

    Raises:
        OSError: a file could not be written.
    """
    files: dict[str, dict[str, Any]] = {}
    failure: OSError | None = None
    for share in shares:
        tensors = iter(share.tensors)
        if share.shapes and failure is None:
            try:
                files[share.file] = _write_file(folder / share.file, share.shapes, tensors)
            except OSError as error:
                failure = error
        for _ in tensors:  # what is left of it; the other ranks wait for this one
            pass
    if failure is not None:
        raise failure
    return files


def read_shards(folder: Path, numbers: Mapping[str, Any]) -> ModelState:
    """Open a model's files; a tensor is mapped, not copied, when it is asked for.

    Args:
        folder: of `write_shares`.
        numbers: of the state that was written.
    """
    places: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        handle = safe_open(file, framework="pt")
        places.setdefault(file.stem.rpartition("-")[0], {}).update(
            dict.fromkeys(handle.keys(), handle)
        )
    return ModelState(
        shapes={
            kind: {name: tuple(handle.get_slice(name).get_shape()) for name, handle in by.items()}
            for kind, by in places.items()
        },
        tensor=lambda kind, name: places[kind][name].get_tensor(name),
        numbers=numbers,
    )


def sha256(file: Path) -> str:
    """Hash a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Have a folder's entries reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rounds(shapes: Mapping[str, tuple[int, ...]], world_size: int) -> list[list[str]]:
    """Deal the parameters out, the large ones first; in each round every rank gets one.

    The direction changes with every round, so that the shares come out about equal.
    """
    names = sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name))
    rounds = [names[i : i + world_size] for i in range(0, len(names), world_size)]
    return [names if i % 2 == 0 else names[::-1] for i, names in enumerate(rounds)]


def _gather(
    state: ModelState, kind: str, rounds: Iterable[list[str]], rank: int, copies: bool
) -> Iterator[Tensor]:
    """Yield the tensors of one rank. All ranks gather a round, then each writes its own."""
    for names in rounds:
        mine = None
        for owner, name in enumerate(names):
            tensor = state.tensor(kind, name)
            if owner == rank:
                mine = tensor.detach().to("cpu", torch.float32, copy=copies)
            del tensor
        if mine is not None:
            yield mine


def _write_file(
    file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[Tensor]
) -> dict[str, Any]:
    """Write one safetensors file, tensor by tensor, and hash it on the way.

    The library's own writer wants all tensors in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        head = len(text).to_bytes(8, "little") + text
        digest.update(head)
        stream.write(head)
        for _ in shapes:
            tensor = next(tensors)
            content = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] - numpy 2's arrays are buffers
            digest.update(content)
            stream.write(content)
            del tensor, content  # before the next one is gathered
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    return {
        "size": size,
        "sha256": digest.hexdigest(),
        "tensors": {name: list(shape) for name, shape in shapes.items()},
    }
