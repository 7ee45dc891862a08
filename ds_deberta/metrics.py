"""What a run shows: metrics.jsonl, TensorBoard, and the console.

During training everything stays on the device; `log` is the loop's only device-to-host sync.
The x axis is the optimizer step, everywhere.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ds_deberta.data.shards import write_durably
from ds_deberta.distributed import is_main, logger, sum_across_ranks
from ds_deberta.objectives import Metrics
from ds_deberta.ranking import Ranking

_TENSORBOARD_GROUPS = {  # the first prefix that fits names the chart's group
    "rtd_": "rtd",
    "replaced_": "rtd",
    "learning_rate": "optimizer",
    "grad_norm": "optimizer",
    "loss_scale": "optimizer",
    "skipped_steps": "optimizer",
    "tokens_": "speed",
    "step_seconds": "speed",
    "mfu": "speed",
    "data_wait": "speed",
    "memory": "speed",
}


def reduce_metrics(
    steps: Sequence[Metrics], *, scores_of: Sequence[Metrics] = ()
) -> dict[str, float]:
    """Means over steps (or batches) and ranks, and the quality that follows from them. Syncs.

    Args:
        steps: what this rank measured; every rank calls with the same names.
        scores_of: the ones whose discriminator scores go into AUC and average precision.

    Returns:
        Every mean by its name; `perplexity`; for a discriminator also `rtd_gain` (entropy of the
        realised replacement rate minus the loss, nats), `rtd_auc`, `rtd_average_precision`.
    """
    sums = MetricSums()
    for step in steps:
        sums.add(replace(step, scores=None))
    for step in scores_of:
        sums.rank(step)
    return sums.values()


class MetricSums:
    """Adds up what steps or batches measured, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._pairs: Tensor | None = None  # [names, 2] float64: sums and counts
        self._ranking = Ranking()

    def add(self, metrics: Metrics) -> None:
        """Add one step or batch, its scores, too. Nothing leaves the device."""
        self._names = list(metrics.means)
        pairs = torch.stack([torch.stack([x.double() for x in p]) for p in metrics.means.values()])
        self._pairs = pairs if self._pairs is None else self._pairs + pairs
        self.rank(metrics)

    def rank(self, metrics: Metrics) -> None:
        """Add its scores alone, if it has some."""
        if metrics.scores:
            self._ranking.add(metrics.scores)

    def values(self) -> dict[str, float]:
        """As `reduce_metrics`. Every rank must call it. Syncs."""
        assert self._pairs is not None
        pairs = sum_across_ranks(self._pairs).tolist()
        values = {
            name: total / count if count else math.nan
            for name, (total, count) in zip(self._names, pairs, strict=True)
        }
        for loss in ("generator_loss", "mlm_loss"):
            if loss in values:
                values["perplexity"] = math.exp(min(values[loss], 700.0))
        if "replaced_fraction" in values:
            entropy = _entropy(values["replaced_fraction"])
            values["rtd_gain"] = entropy - values["discriminator_loss"]
            values["rtd_auc"], values["rtd_average_precision"] = self._ranking.quality()
        return values


def _entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p) if 0 < p < 1 else 0.0


class MetricTracker:
    """Collects what happens between two log lines and writes it out on rank 0.

    Args:
        output_dir: gets metrics.jsonl and tensorboard/.
        total_steps: of the training, for the progress display.
        start_step: where this process begins; later entries of an interrupted run are dropped.
        flops_per_token: of training (forward and backward), for MFU.
        peak_flops: matrix-product rate of all ranks together, FLOP/s, for MFU.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        start_step: int,
        flops_per_token: float,
        peak_flops: float,
    ) -> None:
        self._total_steps = total_steps
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._start_window()
        if is_main():
            self._jsonl = output_dir / "metrics.jsonl"
            _drop_entries_after(self._jsonl, start_step)
            self._unwritten: list[str] = []
            self._tensorboard = output_dir / "tensorboard"
            self._writer: SummaryWriter | None = SummaryWriter(
                str(self._tensorboard), purge_step=start_step + 1
            )
            self._console = ExitStack()
            self._bar = self._console.enter_context(
                tqdm(
                    total=total_steps,
                    initial=start_step,
                    unit="step",
                    miniters=1,  # else slow steps after fast ones would not move it
                    dynamic_ncols=True,
                    disable=not sys.stderr.isatty(),
                )
            )
            if not self._bar.disable:  # lines of the log stand above it
                self._console.enter_context(logging_redirect_tqdm([logger]))

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent in here counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here (evaluation, checkpoints) does not count as training time."""
        start = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - start

    def update(self, metrics: Metrics, *, applied: bool = True) -> None:
        """Remember one step, and move the bar. Nothing leaves the device.

        Args:
            metrics: what it measured.
            applied: if the weights were not updated, only its tokens count: its losses may be NaN.
        """
        self._tokens.append(metrics.tokens)
        if is_main():
            self._bar.update()
        if not applied:
            return
        if self._steps:  # the AUC is taken over the last step alone: free the others' scores
            self._steps[-1] = replace(self._steps[-1], scores=None)
        self._steps.append(metrics)

    def expect(self, total_steps: int) -> None:
        """Show another end of the training from now on."""
        self._total_steps = total_steps
        if is_main():
            self._bar.total = total_steps

    def log(self, step: int, engine_stats: Mapping[str, float]) -> None:
        """Write the means since the last call, without losses if no update was applied.

        Every rank must call it.
        """
        values = reduce_metrics(self._steps, scores_of=self._steps[-1:]) if self._steps else {}
        tokens = sum_across_ranks(torch.stack(self._tokens).sum())
        seconds = time.perf_counter() - self._window_start
        tokens_per_second = tokens.item() / seconds
        values |= engine_stats
        values |= {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._flops_per_token / self._peak_flops,
            "step_seconds": seconds / len(self._tokens),
            "data_wait_fraction": self._waited / seconds,
            "memory_gib": _peak_memory() / 2**30,
        }
        self._write("train", step, values)
        if is_main():
            self._show_progress(step, values)
        self._start_window()

    def log_eval(
        self,
        step: int,
        values: Mapping[str, float],
        examples: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Write one evaluation; `examples` are rows of text by what was done to them."""
        self._write("valid", step, values)
        if is_main():
            self._say(f"step {step}  valid  {_format(values)}")
            if examples:
                rows = zip(*examples.values(), strict=True)
                lines = [" | ".join(row) for row in (examples, ["-"] * len(examples), *rows)]
                text = "\n".join(f"| {x} |" for x in lines)
                self._draw(lambda writer: writer.add_text("examples", text, step))

    def warn(self, event: str, step: int, message: str, facts: Mapping[str, Any]) -> None:
        """Write down what is wrong: a line of metrics.jsonl, on the console and in TensorBoard.

        Args:
            event: its name, as the line's `split`.
            step: when.
            message: for people.
            facts: for the line.
        """
        if not is_main():
            return
        self._append({"step": step, "split": event, **facts})
        self._say(f"WARNING step {step}: {message}", logging.WARNING)
        self._draw(lambda writer: writer.add_text("warning", message, step))

    def log_text(self, name: str, text: str) -> None:
        """Put a text (the configuration, say) on TensorBoard's first page."""
        self._draw(lambda writer: writer.add_text(name, f"```\n{text}\n```", 0))

    def close(self) -> None:
        """Flush and close the files."""
        if is_main():
            self._console.close()
            self._append_lines()
            self._draw(SummaryWriter.close)

    def _start_window(self) -> None:
        self._steps: list[Metrics] = []  # whose updates were applied
        self._tokens: list[Tensor] = []  # of all steps
        self._waited = 0.0
        self._window_start = time.perf_counter()

    def _write(self, split: str, step: int, values: Mapping[str, float]) -> None:
        if not is_main():
            return
        self._append({"step": step, "split": split, **values})

        def add_scalars(writer: SummaryWriter) -> None:
            for name, value in values.items():
                fitting = (g for p, g in _TENSORBOARD_GROUPS.items() if name.startswith(p))
                writer.add_scalar(f"{next(fitting, 'loss')}/{name}/{split}", value, step)

        self._draw(add_scalars)

    def _append(self, row: Mapping[str, Any]) -> None:
        # JSON has no NaN: an undefined value is null.
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self._unwritten.append(json.dumps(row) + "\n")
        self._append_lines()

    def _append_lines(self) -> None:
        """Bring all lines to metrics.jsonl; while the disk has no room, keep them."""
        size = self._jsonl.stat().st_size if self._jsonl.exists() else 0
        try:
            with self._jsonl.open("a") as file:
                file.writelines(self._unwritten)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._jsonl, size)  # no half of a line
            self._say(
                f"{self._jsonl} can not be written: {error}. The training goes on and keeps "
                f"{len(self._unwritten)} lines for later; make room before the next checkpoint.",
                logging.ERROR,
            )
        else:
            self._unwritten.clear()

    def _draw(self, add: Callable[[SummaryWriter], None]) -> None:
        """Hand something to TensorBoard and have it written, or go without."""
        if not is_main() or self._unwritten:  # no room
            return
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._tensorboard))
            add(self._writer)
            self._writer.flush()  # a run that is killed and resumed does not write it again
        except OSError as error:
            self._writer = None
            self._say(
                f"{self._tensorboard} can not be written: {error}. The training goes on; these "
                "curves will lack the steps from here until there is room, metrics.jsonl will not.",
                logging.ERROR,
            )

    def _show_progress(self, step: int, values: Mapping[str, float]) -> None:
        if self._bar.disable:
            eta = (self._total_steps - step) * values["step_seconds"]
            hours, minutes = divmod(round(eta / 60), 60)
            self._say(
                f"step {step}/{self._total_steps}  {_format(values)}  "
                f"{values['tokens_per_second']:,.0f} tokens/s  ETA {hours}:{minutes:02d} h"
            )
        else:
            self._bar.set_postfix_str(_format(values))

    def _say(self, line: str, level: int = logging.INFO) -> None:
        logger.log(level, line)


def _format(values: Mapping[str, float]) -> str:
    shown = {
        "mlm_loss": "loss",
        "generator_loss": "generator",
        "discriminator_loss": "discriminator",
        "mlm_accuracy": "accuracy",
        "rtd_auc": "AUC",
        "rtd_gain": "gain",
    }
    return "  ".join(f"{label} {values[key]:.4f}" for key, label in shown.items() if key in values)


def _peak_memory() -> int:
    """Bytes: of the GPU's allocator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_entries_after(path: Path, step: int) -> None:
    """Keep only what a resumed run will not write again.

    Blank lines, and a last line that a crash cut short, are dropped: no restart waits for them.
    """
    if not path.exists():
        return
    lines = enumerate(path.read_bytes().splitlines(), 1)
    lines = [(number, line) for number, line in lines if line.strip()]
    kept = []
    for number, line in lines:
        entry_step = _step_of(line)
        if entry_step is None and number == lines[-1][0]:
            logger.warning("%s: dropped line %d, which a crash cut short", path, number)
        elif entry_step is None:
            raise ValueError(
                f"{path}, line {number}, must be a JSON object with a step; got {line!r:.100}. "
                "Repair the line or remove it, then resume."
            )
        elif entry_step <= step:
            kept.append(line + b"\n")
    write_durably(path, lambda file: file.write(b"".join(kept)))


def _step_of(line: bytes) -> int | None:
    """The step of an entry; None if the line is not one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix-product rate of this device, FLOP/s: the best of square products.

    They grow to what keeps the device busy, or to where one takes a tenth of a second, as a CPU
    does that only imitates the dtype.
    """
    own = torch.Generator(device).manual_seed(0)  # the model's random stream stays untouched
    best, seconds = 0.0, 0.0
    for size in (1024, 2048, 4096, 8192) if device.type == "cuda" else (128, 256, 512, 1024):
        a = torch.randn(size, size, device=device, generator=own).to(dtype)
        torch.mm(a, a)  # loads what this size needs
        for _ in range(8):
            if seconds > 0.1:
                return best
            start = time.perf_counter()
            torch.mm(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            best = max(best, 2 * size**3 / seconds)
    return best


def processor() -> str:
    """Name of what computes here, for reports."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {name}"
