"""The loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from ds_deberta.checkpoint import Checkpointer, SaveError, TrainState
from ds_deberta.data import DebertaTokenizer
from ds_deberta.data.loader import Batch
from ds_deberta.data.sampler import SkippedSamples
from ds_deberta.distributed import logger, seed_step
from ds_deberta.health import Health, TrainingLostError
from ds_deberta.horizon import Horizon
from ds_deberta.metrics import MetricSums, MetricTracker
from ds_deberta.objectives import Objective
from ds_deberta.stop import StopRequest
from ds_deberta.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what happens on the way."""

    num_training_steps: int = 1_000_000
    """Optimizer steps of the whole training."""
    epochs: float | None = None
    """Train for so many passes over the training rows, in place of --num_training_steps."""
    max_minutes: float | None = None
    """End after so many minutes, or --num_training_steps if these come first: with an evaluation, a
    checkpoint and the export, which come on top. The learning-rate schedule is fitted: it ends when
    the minutes do, and its warm-up lasts a quarter of the run at most. Minutes before a stop count.
    The weights depend on the machine's speed then, and a resumed run is not equal bit for bit."""
    train_batch_size: int = 256
    """Rows per optimizer step, over all processes and micro-batches."""
    micro_batch_size: int | None = None
    """Rows per process and forward pass, if it has as many; default: what divides, up to 32."""
    log_interval: int = 100
    """Optimizer steps between log lines."""
    eval_interval: int | None = None
    """Optimizer steps between evaluations. Default: as many as keep them under a twentieth of the
    time, at least 100 and a thousandth of the training, at most --dump_interval."""
    eval_rows: int | None = None
    """Held-out rows of each evaluation, evenly spaced and the same each time; 0: all. Default: as
    many as hold 2^20 tokens, which costs about a third of what training on them does."""
    dump_interval: int = 10_000
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many checkpoints to keep, newest first; 0 keeps all."""
    export_interval: int | None = None
    """Optimizer steps between exports on the way, to <output_dir>/exports/step_*; a multiple of
    --dump_interval. Default: only one at the end, to <output_dir>/export."""
    save_in_background: bool = True
    """Training goes on while a checkpoint is written, from a copy in CPU memory: 12 bytes per
    parameter, divided by the number of processes. false: it waits, as for the last one."""

    def __post_init__(self) -> None:
        for name in ("num_training_steps", "train_batch_size", "log_interval", "dump_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch_size", "eval_interval", "export_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.export_interval and self.export_interval % self.dump_interval:
            more = -(-self.export_interval // self.dump_interval) * self.dump_interval
            raise ValueError(
                "export_interval must be a multiple of dump_interval, because an export is made "
                f"of a checkpoint; got {self.export_interval} and {self.dump_interval}. Try "
                f"--export_interval {more}."
            )
        for name in ("epochs", "max_minutes"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("keep_checkpoints", "eval_rows"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def micro_batch(self, world_size: int) -> int:
        """Rows per process and forward pass.

        Raises:
            ValueError: the batch cannot be cut that way.
        """
        per_rank, rest = divmod(self.train_batch_size, world_size)
        if rest or per_rank == 0:
            raise ValueError(
                f"train_batch_size must be a multiple of the {world_size} processes, got "
                f"{self.train_batch_size}. Try --train_batch_size {world_size * max(1, per_rank)}."
            )
        most = min(self.micro_batch_size or 32, per_rank)
        fitting = max(rows for rows in range(1, most + 1) if per_rank % rows == 0)
        if self.micro_batch_size and fitting != most:
            raise ValueError(
                "train_batch_size must be a multiple of micro_batch_size x processes, got "
                f"{self.train_batch_size} and {self.micro_batch_size} x {world_size}. "
                f"Try --micro_batch_size {fitting}."
            )
        return fitting


def train(
    objective: Objective,
    train_batches: Iterator[list[Batch]],
    valid_batches: Iterable[Batch] | None,
    state: TrainState,
    horizon: Horizon,
    checkpointer: Checkpointer,
    metrics: MetricTracker,
    config: TrainConfig,
    health: Health,
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    export: Callable[[Path | None], None],
    skipped: SkippedSamples,
    seed: int,
    tokenizer: DebertaTokenizer,
    device: torch.device,
) -> None:
    """Train until the horizon, logging, evaluating and saving on the way.

    Each checkpoint that is complete, also the one resumed from, is handed to `export`.
    Ends earlier, with a checkpoint, if `stop` is agreed on. Dropout is a function of seed and step.
    Without `valid_batches` it does not evaluate.
    A checkpoint on the way is written in the background, and finished between two steps, once the
    ranks have told each other that all have written; at the latest before the next one.

    Raises:
        SaveError: the last checkpoint could not be written. (One on the way is tried again at the
            next interval.)
        TrainingLostError: on all ranks, with nothing saved if updates can not be applied, and
            with a checkpoint after a collapse.
    """
    eval_interval = config.eval_interval or config.dump_interval

    def evaluate_now() -> None:
        assert valid_batches is not None
        values, examples = evaluate(objective, watchdog.over(valid_batches), device)
        metrics.log_eval(state.step, values, as_text(examples, tokenizer))
        state.evaluation_pending = False
        health.check_evaluation(state.step, values)

    def follow_horizon() -> None:
        metrics.expect(horizon.total_steps)
        health.longest_warmup = horizon.longest_warmup
        for engine in objective.engines.values():
            engine.follow_schedule()

    def succeeds(action: Callable[[], None]) -> bool:
        watchdog.progress()
        try:
            action()
        except SaveError as error:
            logger.warning("%s; training goes on, and saves again at the next time", error)
            return False
        finally:
            watchdog.progress()
        return True

    def finish() -> None:
        succeeds(checkpointer.finish)
        export_newest()

    def export_newest() -> None:
        watchdog.progress()
        export(checkpointer.current)
        watchdog.progress()

    export_newest()
    horizon.start()
    if horizon.is_timed:
        follow_horizon()
    if valid_batches is None:
        state.evaluation_pending = False
    if state.evaluation_pending:
        with metrics.paused():
            evaluate_now()
    while state.step < horizon.total_steps and not stop.signal:
        with metrics.waiting_for_data():
            micro_batches = [batch.to(device) for batch in next(train_batches)]
        watchdog.progress()
        seed_step(seed, state.step)
        measured = objective.train_step(micro_batches)
        watchdog.progress()
        state.step += 1
        first = skipped.nth(0, state.consumed_samples)
        last = skipped.nth(config.train_batch_size - 1, state.consumed_samples)
        state.consumed_samples = last + 1
        try:
            applied = health.check_step(state.step, objective.engines, measured, (first, last))
        except TrainingLostError:
            finish()
            raise
        metrics.update(measured, applied=applied)

        saving = state.step % config.dump_interval == 0
        evaluating = state.step % eval_interval == 0
        stopping = stop.agreed(
            now=saving or evaluating or state.step >= horizon.total_steps,
            ready=not checkpointer.is_writing,
            seconds=horizon.seconds,
        )
        if horizon.is_timed and stop.seconds is not None:
            horizon.fit(state.step, stop.seconds)
            follow_horizon()
        ending = state.step >= horizon.total_steps
        state.evaluation_pending = (evaluating or ending) and valid_batches is not None
        if state.step % config.log_interval == 0 or ending or stopping:
            metrics.log(state.step, engine_stats(objective))  # the loop's only sync
        with metrics.paused():
            if stop.all_ready:
                finish()
            if state.evaluation_pending and not stopping:
                evaluate_now()
                stopping = stop.agreed(now=True)
            is_last = ending or stopping or bool(health.collapsed)
            if saving or is_last:
                finish()
                state.seconds = horizon.seconds
                save = partial(checkpointer.save, state, objective.engines)
                if is_last:
                    save()
                    export_newest()
                elif succeeds(partial(save, in_background=config.save_in_background)):
                    stop.agreed(now=True)
            if health.collapsed:
                raise TrainingLostError(f"step {state.step}, saved: {health.collapsed}")
    checkpointer.finish()  # of a stop just after a save
    export_newest()


@torch.no_grad()
def evaluate(
    objective: Objective, batches: Iterable[Batch], device: torch.device
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Measure the held-out rows, each exactly once over all ranks, with dropout off.

    Returns:
        The means over all ranks, and this rank's first rows as the models saw them.
    """
    modules = [engine.module for engine in objective.engines.values()]
    for module in modules:
        module.eval()
    sums, examples = MetricSums(), {}
    for batch in batches:
        measured = objective.eval_step(batch.to(device))
        sums.add(measured)
        examples = examples or measured.examples
    for module in modules:
        module.train()
    return sums.values(), examples


def engine_stats(objective: Objective) -> dict[str, float]:
    """Learning rates, gradient norms and so on of every engine, by name.

    `learning_rate` is the first engine's (the generator's); each engine's own follow as
    `learning_rate_discriminator`, `grad_norm_generator` and the like.
    """
    stats: dict[str, float] = {}
    for name, engine in objective.engines.items():
        values = engine.stats()
        stats.setdefault("learning_rate", values["learning_rate"])
        stats |= {f"{key}_{name}": value for key, value in values.items()}
    return stats


def as_text(
    examples: Mapping[str, torch.Tensor], tokenizer: DebertaTokenizer
) -> dict[str, list[str]]:
    """Rows of ids as text, without padding; an id that has no piece as its number: <401>."""
    pad, live = tokenizer.special.pad, range(tokenizer.num_tokens)

    def show(row: list[int]) -> str:
        runs = groupby((i for i in row if i != pad), live.__contains__)
        return " ".join(
            tokenizer.decode(run) if is_live else " ".join(f"<{i}>" for i in run)
            for is_live, run in runs
        )

    return {name: [show(row) for row in rows.tolist()] for name, rows in examples.items()}
