"""The export of a run's checkpoint: current, whole, and the old one until the new one is there."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ds_deberta.checkpoint import Checkpointer, TrainState
from ds_deberta.hf import export_checkpoint, is_export_of, update_export
from ds_deberta.hf_tokenizer import write_tokenizer
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD
from ds_deberta.model_state import ModelState


class Engine:
    """A model that is saved, and moves by one between two saves."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state(self) -> ModelState:
        weights = self.model.state_dict()
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(1)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return ModelState({"weights": shapes}, lambda _, name: weights[name], {})

    def restore(self, state: ModelState) -> None:
        raise AssertionError


@pytest.fixture
def checkpoints(tiny_config: DebertaConfig, vocab_file: Path, tmp_path: Path) -> list[Path]:
    """Two checkpoints of one run."""
    engines = {
        "generator": Engine(DebertaForMaskedLM(tiny_config)),
        "discriminator": Engine(DebertaForRTD(tiny_config, embedding_sharing="gdes")),
    }
    models = {name: tiny_config.to_dict() for name in engines}
    saver = Checkpointer(
        tmp_path / "run",
        keep=0,
        identity={},
        placement={},
        contents={"models": models, "embedding_sharing": "gdes"},
        vocab_file=vocab_file,
    )
    found = []
    for step in (10, 20):
        saver.save(TrainState(step), engines)
        found.append(saver.current)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_export_is_made_once_for_each_checkpoint_and_names_it(checkpoints, tmp_path):
    first, second = checkpoints
    export = tmp_path / "run/export"
    assert not is_export_of(export, first)
    assert update_export(first, export)
    assert names(export) == ["discriminator", "export.json", "generator"]
    record = json.loads((export / "export.json").read_text())
    assert (record["checkpoint"], record["step"]) == ("step_0000010", 10)
    old = load_file(export / "generator/model.safetensors")
    assert not update_export(first, export)

    assert not is_export_of(export, second)
    assert update_export(second, export)
    assert json.loads((export / "export.json").read_text())["step"] == 20
    new = load_file(export / "generator/model.safetensors")
    assert all(torch.equal(new[name], old[name] + 1) for name in old)
    assert not update_export(second, export)
    assert names(tmp_path / "run") == ["checkpoints", "export"]


def test_an_export_that_lacks_its_record_or_a_model_is_replaced(checkpoints, tmp_path):
    export = tmp_path / "run/export"
    update_export(checkpoints[1], export)
    before = {file: file.read_bytes() for file in export.rglob("*") if file.is_file()}
    for file in ("export.json", "generator/model.safetensors"):
        (export / file).unlink()
        assert update_export(checkpoints[1], export)
        assert {file: file.read_bytes() for file in export.rglob("*") if file.is_file()} == before


def test_what_a_killed_export_left_is_removed(checkpoints, tmp_path):
    export = tmp_path / "run/export"
    update_export(checkpoints[0], export)
    export.rename(tmp_path / "run/export.old.tmp")  # killed between the two renames
    export_checkpoint(checkpoints[1], tmp_path / "run/export.tmp")
    assert update_export(checkpoints[1], export)
    assert is_export_of(export, checkpoints[1])
    assert names(tmp_path / "run") == ["checkpoints", "export"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "replace"])
def test_a_failing_write_leaves_the_old_export(checkpoints, tmp_path, monkeypatch, call):
    """Whichever it is: the n-th call fails, for every n until the export gets through."""
    first, second = checkpoints
    export = tmp_path / "run/export"
    update_export(first, export)
    real = getattr(os, call)
    for n in range(100):
        calls = iter(range(1000))

        def failing(*args, calls=calls, n=n, **kwargs):
            if next(calls) == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                assert update_export(second, export)
                break
            except OSError:
                pass
        assert is_export_of(export, first)
        assert not (tmp_path / "run/export.tmp").exists()
    assert n > 0
    assert is_export_of(export, second)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond a size, as on a disk that has no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_an_oserror_wherever_it_ends(checkpoints, vocab_file, tmp_path):
    with files_up_to(1000), pytest.raises(OSError, match="File too large"):
        update_export(checkpoints[0], tmp_path / "run/export")
    assert names(tmp_path / "run") == ["checkpoints"]
    room = vocab_file.stat().st_size + 1000  # for spm.model, and not for tokenizer.json
    with files_up_to(room), pytest.raises(OSError, match="File too large"):
        write_tokenizer(vocab_file, tmp_path, max_length=32)
