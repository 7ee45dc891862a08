"""How long checkpoints hold up a training: written while it waits, and in the background.

    python benchmarks/checkpoint.py > benchmarks/results/checkpoint_cpu.md

The loop is `trainer.train`, with real engines and files: the preset deberta-v3-nano with its public
vocabulary, ZeRO 0 in fp32, one process, random rows. Each part of it saves once, after its first
step, and makes its other steps after that, or meanwhile; the two ways take turns.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from data_startup import train_vocabulary
from memory import run_of, train
from step import make_batch

from ds_deberta import build, checkpoint, trainer
from ds_deberta.checkpoint import Checkpointer, TrainState
from ds_deberta.data import DebertaTokenizer
from ds_deberta.data.sampler import SkippedSamples
from ds_deberta.distributed import initialize, shutdown
from ds_deberta.health import Health, HealthConfig
from ds_deberta.horizon import Horizon
from ds_deberta.metrics import MetricTracker, processor
from ds_deberta.model_state import Share, write_shares
from ds_deberta.objectives import Objective
from ds_deberta.stop import StopRequest
from ds_deberta.watchdog import Watchdog

INTERVALS = (100, trainer.TrainConfig().dump_interval)
NEVER = 10**9


class Timed:
    """A Checkpointer that adds up the seconds in which the training's thread is in it."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self.seconds = 0.0

    @property
    def is_writing(self) -> bool:
        """As the Checkpointer's."""
        return self._checkpointer.is_writing

    def save(self, *args: Any, **options: Any) -> None:
        """As the Checkpointer's."""
        self._time(lambda: self._checkpointer.save(*args, **options))

    def finish(self) -> None:
        """As the Checkpointer's."""
        self._time(self._checkpointer.finish)

    def _time(self, action: Callable[[], None]) -> None:
        start = time.perf_counter()
        action()
        self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Measured:
    """Seconds of a part of a training."""

    step: float
    stall: float
    """In which it stood still for its save."""
    writing: float
    """Processor time of the thread that wrote."""


class Bench:
    """A training of which parts are run.

    Args:
        folder: for the checkpoints.
        steps: of a part.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._writing: list[float] = []
        checkpoint.write_shares = self._write
        run = run_of("nano")
        configs = build.model_configs(run, None)
        vocab_size = next(iter(configs.values())).vocab_size
        self._folder, self._steps = folder, steps
        self._objective: Objective = train(run, configs)
        self._batch = make_batch(run.train.train_batch_size, run.data.row_length, vocab_size)
        (folder / "spm.model").write_bytes(train_vocabulary())
        self._tokenizer = DebertaTokenizer(folder / "spm.model")
        self.parameters = sum(
            p.numel() for e in self._objective.engines.values() for p in e.module.parameters()
        )

    def part(self, *, in_background: bool) -> Measured:
        """Some steps, with a save after the first."""
        output_dir = self._folder / "run"
        checkpointer = Timed(
            Checkpointer(
                output_dir,
                keep=1,
                identity={"data": ""},
                placement={},
                contents={},
                vocab_file=self._folder / "spm.model",
            )
        )
        metrics = MetricTracker(
            output_dir, total_steps=NEVER, start_step=0, flops_per_token=1, peak_flops=1
        )
        interval = 10 * self._steps
        with contextlib.suppress(StopIteration), StopRequest() as stop:  # when the batches end
            start = time.perf_counter()
            trainer.train(
                self._objective,
                self._batches(),
                [],
                TrainState(interval - 1),
                Horizon(NEVER),
                checkpointer,  # pyright: ignore[reportArgumentType]
                metrics,
                trainer.TrainConfig(
                    dump_interval=interval,
                    log_interval=NEVER,
                    eval_interval=NEVER,
                    save_in_background=in_background,
                ),
                Health(HealthConfig(), metrics, warmup_steps=NEVER),
                stop,
                Watchdog(output_dir, 0),
                export=lambda _: None,
                skipped=SkippedSamples(),
                seed=0,
                tokenizer=self._tokenizer,
                device=torch.device("cpu"),
            )
        seconds = time.perf_counter() - start
        metrics.close()
        if not list((output_dir / "checkpoints").glob("step_*[0-9]")):
            raise SystemExit(f"a save takes longer than {self._steps} steps; give more --steps")
        shutil.rmtree(output_dir)
        step = (seconds - checkpointer.seconds) / self._steps
        return Measured(step, checkpointer.seconds, self._writing.pop())

    def _write(self, shares: Iterable[Share], folder: Path) -> dict[str, Any]:
        start = time.thread_time()
        files = write_shares(shares, folder)
        self._writing.append(time.thread_time() - start)
        return files

    def _batches(self) -> Iterator[list[Any]]:
        for _ in range(self._steps):
            yield [self._batch]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of a run with one save")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to write to")
    args = parser.parse_args()
    initialize(seed=0)
    modes = {"training waits": False, "in the background": True}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(Path(folder), args.steps)
        found: dict[str, list[Measured]] = {name: [] for name in modes}
        for _ in range(args.rounds):
            for name, in_background in modes.items():
                found[name].append(bench.part(in_background=in_background))
    steps = [part.step for part in found["training waits"]]
    step = median(steps)
    print(
        f"`python benchmarks/checkpoint.py --steps {args.steps} --rounds {args.rounds}`: "
        f"{processor()}, torch {torch.__version__}\n\n"
        f"{bench.parameters / 1e6:.1f} M parameters, {12 * bench.parameters / 2**20:,.0f} MiB a "
        f"checkpoint; a step takes {step:.2f} s ({min(steps):.2f} to {max(steps):.2f}). Load of "
        f"the machine's {os.cpu_count()} processors: {os.getloadavg()[1]:.1f}.\n"
    )
    columns = "".join(f" | stall, a save every {interval:,} steps" for interval in INTERVALS)
    print(f"| | stall per save | processor time of writing{columns} |")
    print(f"|-|-|-|{'-|' * len(INTERVALS)}")
    for name, parts in found.items():
        stalls, writing = [part.stall for part in parts], median(part.writing for part in parts)
        stall = median(stalls)
        shares = "".join(f" | {stall / (stall + interval * step):.3%}" for interval in INTERVALS)
        print(
            f"| {name} | {stall:.2f} s ({min(stalls):.2f} to {max(stalls):.2f}) | {writing:.2f} s"
            f"{shares} |"
        )
    print(
        "\nMedians of the rounds. Stall: the seconds in which training stands still for a save. "
        "In the background the processor time of writing (hashing, mostly) is taken from the steps "
        "meanwhile where these run on the same processors. The shares follow from stall and step."
    )
    shutdown()


if __name__ == "__main__":
    main()
