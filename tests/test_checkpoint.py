"""Saving, resuming and what may change between; in one process, with engines of a few numbers."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2

from ds_deberta.checkpoint import Checkpointer, DamageError, TrainState, read_description
from ds_deberta.model_state import ModelState


class FakeEngine:
    """Trains two tensors, and counts."""

    def __init__(self, value: float) -> None:
        self.kinds = {
            kind: {"table": torch.full((5, 3), value), "bias": torch.full((3,), value + 1)}
            for kind in ("weights", "exp_avg")
        }
        self.count = value

    def state(self) -> ModelState:
        shapes = {
            kind: {name: tuple(tensor.shape) for name, tensor in by_name.items()}
            for kind, by_name in self.kinds.items()
        }
        return ModelState(shapes, lambda kind, name: self.kinds[kind][name], {"count": self.count})

    def restore(self, state: ModelState) -> None:
        for kind, shapes in state.shapes.items():
            for name in shapes:
                self.kinds[kind][name] = state.tensor(kind, name).clone()
        self.count = state.numbers["count"]

    def holds(self, value: float) -> bool:
        expected = FakeEngine(value)
        return self.count == value and all(
            torch.equal(tensor, expected.kinds[kind][name])
            for kind, by_name in self.kinds.items()
            for name, tensor in by_name.items()
        )


def checkpointer(
    tmp_path: Path,
    keep: int = 0,
    placement: dict | None = None,
    accept: tuple = (),
    vocabulary: bytes = b"pieces",
    **identity,
) -> Checkpointer:
    vocab = tmp_path / "vocab"
    vocab.write_bytes(vocabulary)
    return Checkpointer(
        tmp_path / "run",
        keep=keep,
        identity={"seed": 1, "data": "a", "models": {"model": {"layers": 2, "width": 8}}}
        | identity,
        placement=placement or {"world size": 2, "ZeRO stage": 1, "precision": "bfloat16"},
        contents={"models": {}},
        vocab_file=vocab,
        accept_changes=accept,
    )


def save(saver: Checkpointer, step: int, *, in_background: bool = False) -> Path:
    engines = {"generator": FakeEngine(step), "discriminator": FakeEngine(step + 0.5)}
    saver.save(TrainState(step, step * 8), engines, in_background=in_background)
    saver.finish()
    return saver.current


def resumed(saver: Checkpointer) -> TrainState:
    """Resume, and check that both engines are those of the step."""
    engines = {"generator": FakeEngine(-1), "discriminator": FakeEngine(-1)}
    state = saver.resume(engines)
    if state.step:
        assert engines["generator"].holds(state.step)
        assert engines["discriminator"].holds(state.step + 0.5)
    return state


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ds_deberta"), "propagate", True)
    caplog.set_level(logging.INFO, "ds_deberta")
    return caplog


def test_nothing_to_resume_starts_at_zero(tmp_path):
    assert resumed(checkpointer(tmp_path)) == TrainState(0, 0)


def test_what_was_saved_comes_back_and_the_newest_wins(tmp_path):
    for step in (9, 100, 20, 10_000_000):
        save(checkpointer(tmp_path), step)
    saver = checkpointer(tmp_path)
    assert resumed(saver) == TrainState(10_000_000, 80_000_000)
    assert saver.current == tmp_path / "run/checkpoints/step_10000000"


def test_other_settings_are_refused_by_name(tmp_path):
    save(checkpointer(tmp_path, betas=(0.9, 0.99)), 1)
    with pytest.raises(ValueError, match=r"seed: 1 then, 2 now\). .* by --accept_changes seed, or"):
        resumed(checkpointer(tmp_path, seed=2, betas=(0.9, 0.99)))
    models = {"model": {"layers": 3, "width": 8}}
    with pytest.raises(ValueError, match=r"models\.model\.layers: 2 then, 3 now") as error:
        resumed(checkpointer(tmp_path, seed=2, models=models, betas=(0.9, 0.99), accept=("seed",)))
    assert "accept_changes" not in str(error.value)
    assert "width" not in str(error.value)
    for name in ("models", "nonsense"):
        with pytest.raises(ValueError, match=rf"can be any of data, seed; got {name}"):
            checkpointer(tmp_path, accept=(name,))


def test_what_only_fresh_weights_depend_on_is_not_compared(tmp_path):
    """A preset's initializer_range may change between two versions of this program."""
    models = {"model": {"layers": 2, "initializer_range": 0.02}}
    save(checkpointer(tmp_path, models=models), 10)
    models = {"model": {"layers": 2, "initializer_range": 0.05}}
    assert resumed(checkpointer(tmp_path, models=models)).step == 10
    models["model"]["layers"] = 3
    with pytest.raises(ValueError, match=r"layers: 2 then, 3 now\)"):
        resumed(checkpointer(tmp_path, models=models))


def test_accepted_changes_are_told_and_new_data_are_read_from_the_start(tmp_path, log):
    save(checkpointer(tmp_path), 10)
    saver = checkpointer(tmp_path, data="b", seed=5, accept=("data", "seed"))
    assert resumed(saver) == TrainState(10, 0)
    assert "accepted: data: 'a' then, 'b' now" in log.text
    assert "accepted: seed: 1 then, 5 now" in log.text
    assert "read from their first row on" in log.text
    saver.save(TrainState(20, 80), {"generator": FakeEngine(20), "discriminator": FakeEngine(20.5)})
    assert resumed(checkpointer(tmp_path, data="b", seed=5)) == TrainState(20, 80)


def test_a_vocabulary_with_other_pieces_is_refused_whatever_is_accepted(tmp_path, vocab_file):
    def changed(change) -> bytes:
        model = sentencepiece_model_pb2.ModelProto.FromString(vocab_file.read_bytes())
        change(model.pieces)
        return model.SerializeToString()

    def swap(pieces) -> None:
        pieces[260].piece, pieces[261].piece = pieces[261].piece, pieces[260].piece

    def append(pieces) -> None:
        pieces.add(piece="more", score=-9.0)

    def score(pieces) -> None:
        pieces[260].score -= 1

    save(checkpointer(tmp_path, vocabulary=vocab_file.read_bytes()), 10)
    for change, first in ((swap, 260), (append, 300)):
        other = checkpointer(tmp_path, vocabulary=changed(change), data="b", accept=("data",))
        for look in (lambda saver=other: resumed(saver), other.check):
            with pytest.raises(ValueError, match=rf"vocabularies must be the same; id {first} is"):
                look()
    with pytest.raises(ValueError, match=r"--accept_changes data"):
        resumed(checkpointer(tmp_path, vocabulary=changed(score), data="b"))
    same = checkpointer(tmp_path, vocabulary=changed(score), data="b", accept=("data",))
    assert resumed(same).step == 10


def test_a_move_is_told_in_one_line(tmp_path, log):
    save(checkpointer(tmp_path), 10)
    resumed(checkpointer(tmp_path))
    assert "saved with" not in log.text
    now = {"world size": 1, "ZeRO stage": 1, "precision": "float32"}
    resumed(checkpointer(tmp_path, placement=now))
    told = "step_0000010, saved with world size 2, precision bfloat16; "
    assert f"{told}now with world size 1, precision float32" in log.text


def test_only_the_newest_are_kept_and_the_last_good_one_always(tmp_path):
    saver = checkpointer(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(saver, step)
    assert folders(tmp_path) == ["step_0000020", "step_0000030"]
    for step in (20, 30):
        (tmp_path / f"run/checkpoints/step_00000{step}/spm.model").unlink()
    shutil.copytree(
        tmp_path / "run/checkpoints/step_0000030", tmp_path / "run/checkpoints/step_0000040"
    )
    save(saver, 25)
    assert folders(tmp_path) == ["step_0000020", "step_0000025", "step_0000030", "step_0000040"]
    assert resumed(checkpointer(tmp_path)).step == 25
    save(saver, 30)
    assert folders(tmp_path) == ["step_0000025", "step_0000030", "step_0000040"]
    assert resumed(checkpointer(tmp_path)).step == 30


def test_no_whole_checkpoint_is_deleted_in_favour_of_a_damaged_one(tmp_path):
    """Known from the resume, or seen by its files' sizes."""
    for step in (10, 20, 30):
        path = save(checkpointer(tmp_path), step)
    flipped = path / "spm.model"
    flipped.write_bytes(flipped.read_bytes()[::-1])
    saver = checkpointer(tmp_path, keep=2)
    assert resumed(saver).step == 20
    save(saver, 40)
    assert folders(tmp_path) == ["step_0000020", "step_0000030", "step_0000040"]
    os.truncate(tmp_path / "run/checkpoints/step_0000040/generator/exp_avg-00000.safetensors", 9)
    save(saver, 50)
    assert folders(tmp_path) == [f"step_00000{step}" for step in (20, 30, 40, 50)]
    save(saver, 60)
    assert folders(tmp_path) == ["step_0000050", "step_0000060"]


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = save(checkpointer(tmp_path), 10)
    finally:
        os.umask(old)
    modes = {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()}
    assert modes == {0o640}
    assert path.stat().st_mode & 0o777 == 0o750


def test_it_says_in_plain_json_what_it_holds(tmp_path):
    path = save(checkpointer(tmp_path), 10)
    found = json.loads((path / "checkpoint.json").read_text())
    assert found["state"] == {
        "step": 10,
        "consumed_samples": 80,
        "evaluation_pending": False,
        "seconds": 0.0,
    }
    assert found["numbers"] == {"generator": {"count": 10}, "discriminator": {"count": 10.5}}
    assert found["files"]["generator/weights-00000.safetensors"]["tensors"] == {
        "table": [5, 3],
        "bias": [3],
    }
    assert not [file for file in path.rglob("*") if file.suffix in (".pt", ".bin", ".pkl")]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint\.json"):
        read_description(tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="format version 1, this program reads 2"):
        read_description(tmp_path)
    (tmp_path / "checkpoint.json").write_text("[" * 100_000)
    with pytest.raises(DamageError, match="is damaged: it is no JSON"):
        read_description(tmp_path)
    old = tmp_path / "run/checkpoints/step_0000007"
    old.mkdir(parents=True)
    (old / "checkpoint.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="format version 1, this program reads 2"):
        resumed(checkpointer(tmp_path))
