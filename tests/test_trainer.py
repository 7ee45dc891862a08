"""The loop goes on while a checkpoint is written; with real files, and a step that only counts."""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_deberta import checkpoint, trainer
from ds_deberta.checkpoint import SaveError, TrainState, read_description
from ds_deberta.data.sampler import SkippedSamples
from ds_deberta.health import TrainingLostError
from ds_deberta.horizon import Horizon
from ds_deberta.model_state import Share, read_shards, write_shares
from ds_deberta.stop import StopRequest
from ds_deberta.trainer import TrainConfig
from ds_deberta.watchdog import Watchdog
from tests.test_checkpoint import FakeEngine, checkpointer, folders, log  # noqa: F401 - a fixture

DUMP = 40  # the ranks talk at least every 10 steps


class Training:
    """A training whose weights are the number of its steps; calls `at[step]` in that step."""

    def __init__(self, folder: Path, at: dict[int, Callable[[], object]]) -> None:
        self.folder, self.at = folder, at
        self.state = TrainState()
        self.engine = FakeEngine(0)
        self.saver = checkpointer(folder)
        self.lost_at: int | None = None
        self.valid_batches: list | None = []
        self.horizon: Horizon | None = None
        self.exported: list[Path | None] = []

    def train(self, steps: int, **config: object) -> None:
        no_metrics = SimpleNamespace(
            waiting_for_data=contextlib.nullcontext,
            paused=contextlib.nullcontext,
            update=lambda *_, **__: None,
            expect=lambda _: None,
            log=lambda *_: None,
            log_eval=lambda *_: None,
        )
        healthy = SimpleNamespace(
            collapsed="", check_step=self.check, check_evaluation=lambda *_: None
        )
        with StopRequest() as stop:
            trainer.train(
                SimpleNamespace(train_step=self.step, engines={"model": self.engine}),
                iter(lambda: [], None),
                self.valid_batches,
                self.state,
                self.horizon or Horizon(steps),
                self.saver,
                no_metrics,
                TrainConfig(dump_interval=DUMP, **config),
                healthy,
                stop,
                Watchdog(self.folder, 0),
                export=self.exported.append,
                skipped=SkippedSamples(),
                seed=0,
                tokenizer=SimpleNamespace(special=SimpleNamespace(pad=0), num_tokens=0),
                device=torch.device("cpu"),
            )

    def step(self, _: object) -> None:
        for tensors in self.engine.kinds.values():
            for tensor in tensors.values():
                tensor += 1  # in place, as an optimizer does
        self.engine.count += 1
        self.at.get(self.engine.count, int)()

    def check(self, step: int, *_: object) -> bool:
        if step == self.lost_at:
            raise TrainingLostError("too many")
        return True

    def saved(self) -> list[int]:
        """The steps of all checkpoints; each must hold what its step had."""
        found = [name for name in folders(self.folder) if not name.endswith(".tmp")]
        for name in found:
            path = self.folder / "run/checkpoints" / name
            engine, facts = FakeEngine(-1), read_description(path)
            engine.restore(read_shards(path / "model", facts["numbers"]["model"]))
            assert engine.holds(facts["state"]["step"])
            assert facts["state"]["consumed_samples"] == 256 * facts["state"]["step"]
            assert path.name == f"step_{facts['state']['step']:07d}"
        return [int(name.removeprefix("step_")) for name in found]


@pytest.fixture(autouse=True)
def _no_evaluation(monkeypatch):
    monkeypatch.setattr(trainer, "evaluate", lambda *_: ({}, {}))
    monkeypatch.setattr(trainer, "engine_stats", lambda _: {})


class Writer:
    """What writes in the background: waits for `gate`, and fails as long as `is_full`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = 0
        self.is_full = False

    def write(self, shares: Iterable[Share], folder: Path) -> dict[str, Any]:
        if threading.current_thread() is not threading.main_thread():
            self.begun += 1
            assert self.gate.wait(30)
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write_shares(shares, folder)


@pytest.fixture
def writer(monkeypatch) -> Iterator[Writer]:
    found = Writer()
    monkeypatch.setattr(checkpoint, "write_shares", found.write)
    yield found
    found.gate.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, writer):
    """It is finished soon after, long before the next one, and holds what its step had."""
    seen = []

    def end_writing() -> None:
        seen.append((writer.begun, training.saved()))
        writer.gate.set()
        while training.saver.is_writing:
            time.sleep(0.01)

    look = {DUMP + 25: end_writing, DUMP + 36: lambda: seen.append(training.saved())}
    training = Training(tmp_path, look)
    training.train(2 * DUMP)
    assert seen == [(1, []), [DUMP]]
    assert training.saved() == [DUMP, 2 * DUMP]


def test_a_save_waits_for_the_one_before(tmp_path, writer):
    seen = []
    training = Training(
        tmp_path,
        {
            2 * DUMP: lambda: threading.Timer(0.3, writer.gate.set).start(),
            2 * DUMP + 1: lambda: seen.append(training.saved()),
        },
    )
    training.train(3 * DUMP)
    assert seen == [[DUMP]]
    assert training.saved() == [DUMP, 2 * DUMP, 3 * DUMP]


def test_a_save_that_fails_in_the_background_is_announced_and_left_out(tmp_path, writer, log):  # noqa: F811
    writer.gate.set()
    writer.is_full = True
    training = Training(tmp_path, {2 * DUMP - 1: lambda: setattr(writer, "is_full", False)})
    training.train(3 * DUMP)
    assert training.saved() == [2 * DUMP, 3 * DUMP]
    (warning,) = (line for line in log.messages if "could not be written" in line)
    assert f"step_{DUMP:07d} could not be written: " in warning
    assert "No space left on device (rank 0); training goes on" in warning


def test_a_stop_while_a_checkpoint_is_written_saves_both(tmp_path, writer):
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # a thread listens
        writer.gate.set()

    training = Training(tmp_path, {DUMP + 5: stop})
    training.train(100 * DUMP)
    first, last = training.saved()
    assert first == DUMP
    assert last in range(DUMP + 5, DUMP + 16)


@pytest.mark.parametrize("is_full", [False, True])
def test_a_stop_just_after_a_save_began_waits_for_it(tmp_path, writer, monkeypatch, is_full):
    writer.is_full = is_full
    training = Training(tmp_path, {})
    save = training.saver.save

    def stopped(*args, **options) -> None:
        save(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        threading.Timer(0.3, writer.gate.set).start()

    monkeypatch.setattr(training.saver, "save", stopped)
    with pytest.raises(SaveError, match="No space") if is_full else contextlib.nullcontext():
        training.train(100 * DUMP)
    assert training.state.step == DUMP
    assert training.saved() == ([] if is_full else [DUMP])
    assert len(folders(tmp_path)) == (0 if is_full else 1)


def test_a_stop_just_after_a_save_has_failed_saves(tmp_path, writer, monkeypatch):
    writer.gate.set()
    training = Training(tmp_path, {})
    save, steps = training.saver.save, []

    def first_fails(state: TrainState, *args, **options) -> None:
        steps.append(state.step)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            raise SaveError("No space left on device")
        save(state, *args, **options)

    monkeypatch.setattr(training.saver, "save", first_fails)
    training.train(100 * DUMP)
    assert steps[0] == DUMP
    assert training.saved() == steps[1:] != []


def test_a_lost_training_finishes_what_it_had_begun_to_save(tmp_path, writer):
    training = Training(tmp_path, {DUMP + 2: writer.gate.set})
    training.lost_at = DUMP + 2
    with pytest.raises(TrainingLostError):
        training.train(2 * DUMP)
    assert training.saved() == [DUMP]


def test_a_training_without_held_out_rows_never_evaluates(tmp_path, monkeypatch):
    """Also if an earlier start, on other data, left an evaluation for later."""
    evaluated = []
    monkeypatch.setattr(trainer, "evaluate", lambda *_: evaluated.append(1) or ({}, {}))
    training = Training(tmp_path, {})
    training.valid_batches, training.state.evaluation_pending = None, True
    training.train(3, eval_interval=1)
    assert not evaluated
    assert not training.state.evaluation_pending
    training.valid_batches = []
    training.train(5, eval_interval=1)
    assert len(evaluated) == 2


def test_each_checkpoint_is_offered_for_export_once_it_is_whole(tmp_path, writer):
    writer.gate.set()
    training = Training(tmp_path, {})
    training.train(3 * DUMP + 5)
    offered = [path.name for path in dict.fromkeys(training.exported) if path]
    assert offered == [f"step_{step:07d}" for step in (DUMP, 2 * DUMP, 3 * DUMP, 3 * DUMP + 5)]
    again = Training(tmp_path, {})
    again.state = again.saver.resume({"model": again.engine})
    again.train(3 * DUMP + 5)
    assert {path.name for path in again.exported if path} == {f"step_{3 * DUMP + 5:07d}"}


def test_a_training_ends_with_its_minutes_and_counts_those_before_a_stop(tmp_path, monkeypatch):
    """Each step takes a second of a clock that only steps move; the schedule follows."""
    now = [0.0]
    monkeypatch.setattr("ds_deberta.horizon.time", SimpleNamespace(monotonic=lambda: now[0]))
    followed = []

    def tick(training: Training, stop_at: int = 0) -> Callable[[], None]:
        def act() -> None:
            now[0] += 1
            if training.engine.count == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)

        return act

    training = Training(tmp_path, {})
    training.engine.follow_schedule = lambda: followed.append(training.horizon.total_steps)
    training.at = dict.fromkeys(range(999), tick(training, stop_at=30))
    training.horizon = Horizon(1000, max_minutes=1)
    training.train(1000)
    stopped_at = training.state.step
    assert 30 <= stopped_at <= 41
    assert training.state.seconds == stopped_at
    assert followed[-1] == 60

    again = Training(tmp_path, {})
    again.engine.follow_schedule = lambda: followed.append(again.horizon.total_steps)
    again.state = again.saver.resume({"model": again.engine})
    again.at = dict.fromkeys(range(999), tick(again))
    again.horizon = Horizon(1000, max_minutes=1)
    again.horizon.resume(again.state.step, again.state.seconds)
    assert again.horizon.total_steps == 60
    again.train(1000)
    assert again.state.step == 60 == again.saved()[-1]


def test_training_waits_where_it_is_told_to(tmp_path, writer):
    training = Training(tmp_path, {})
    training.train(2 * DUMP, save_in_background=False)
    assert writer.begun == 0
    assert training.saved() == [DUMP, 2 * DUMP]


def test_an_id_without_a_piece_is_shown_as_its_number(tokenizer):
    ids, past = tokenizer.encode("the king of the old city"), tokenizer.num_tokens
    rows = torch.tensor([[*ids, tokenizer.special.pad], [ids[0], past, past + 1, *ids[3:], 0]])
    rows = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    whole, holed = trainer.as_text({"predicted": rows}, tokenizer)["predicted"]
    assert whole == "the king of the old city"
    assert f" <{past}> <{past + 1}> " in holed
