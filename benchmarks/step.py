"""Tokens per second of a whole training step.

    python benchmarks/step.py [--starts 3] [--rounds 3] [--only SHAPE] [--compile]
    python benchmarks/step.py --preset deberta-v3-base --rows 32 --length 512 [--profile]

The first, two small shapes against transformers: each side runs in a process of its own, as its
users would run it, and they take turns of equal time, so that a noisy machine slows all of them
alike; what is told is the median of a side's turns. A turn begins with a step that is not timed,
for the others have taken the caches. All are started several times, each time another one first:
a virtual machine's memory is not equally fast everywhere (medians of five turns of three processes
of one program, the last started first: 665, 718 and 825 ms for a step).

Ours: two DeepSpeed engines (ds_configs/zero0_*.json), generator, sampling, discriminator, clipping
and both updates, through `RTDObjective`. Theirs: DebertaV2ForMaskedLM and
DebertaV2ForTokenClassification with independent embeddings, torch's AdamW and the same losses.
Dropout is 0.1 on both sides.

The second, ours alone, on the device at hand, with each attention asked for, and its time by part.
"Of the host": until it has told a GPU what to do; near the whole, the GPU waits for it.

The share of the GEMM rate is MFU: useful matrix-product operations (model/flops.py, three forward
passes) per second, as a share of the best large product measured in the same run and dtype; the
best of all rounds, for a noisy machine can halve one.
Memory on a CPU: the greatest resident size of the process, what it imports included; on CUDA: the
greatest that torch allocated.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ds_deberta.data.loader import IGNORE_INDEX, Batch
from ds_deberta.distributed import computes_in_bf16, initialize
from ds_deberta.kernels import select_attention
from ds_deberta.metrics import measure_peak_flops, processor
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD, generator_config
from ds_deberta.model.flops import forward_flops
from ds_deberta.model.presets import MODELS
from ds_deberta.objectives import Engine, Objective
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from ds_deberta.optim import OptimConfig

TURN_SECONDS = 6.0
CONFIGS = Path(__file__).parent.parent / "ds_configs"
MASKED = 0.15
SHAPES = {
    # name: (discriminator, rows, length)
    "256 x 4/2, 16k words, 16 x 128": (
        DebertaConfig(
            vocab_size=16384, hidden_size=256, num_hidden_layers=4, num_attention_heads=4
        ),
        16,
        128,
    ),
    "384 x 12/6, 128k words, 4 x 128": (
        DebertaConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
        4,
        128,
    ),
}


def make_batch(rows: int, length: int, vocab_size: int) -> Batch:
    """Full rows with 15% of the tokens masked."""
    predictions = round(MASKED * length)
    ids = torch.randint(5, vocab_size - 200, (rows, length))
    positions = torch.stack(
        [torch.randperm(length - 2)[:predictions].sort().values + 1 for _ in range(rows)]
    )
    labels = ids.gather(1, positions)
    return Batch(
        input_ids=ids.scatter(1, positions, 4),
        documents=torch.ones(rows, length, dtype=torch.bool),
        predicted_positions=positions,
        labels=labels,
        uniforms=torch.rand(rows, predictions, dtype=torch.float64),
        sample_numbers=torch.arange(rows),
    )


def our_objective(
    config: DebertaConfig,
    batch: Batch,
    *,
    ds_config: str,
    objective: str = "rtd",
    attention: str = "auto",
    device: str = "cpu",
    compiled: bool = False,
) -> Objective:
    """Engines as a training has them, and the objective around them."""
    from ds_deberta.engine import DeepSpeedFacts, initialize_engine, load_ds_config, precision
    from ds_deberta.horizon import Horizon

    initialize(seed=0)
    optim = OptimConfig(warmup=0)
    rows = len(batch.input_ids)
    facts = DeepSpeedFacts(
        train_batch_size=rows,
        micro_batch_size=rows,
        hidden_size=config.hidden_size,
        lr=1e-4,
        optim=optim,
    )
    resolved = load_ds_config(CONFIGS / f"{ds_config}.json", facts)
    dtype = precision(resolved)
    attend, reason = select_attention(
        attention, device=device, dtype=dtype, head_size=config.head_size
    )
    print(reason, file=sys.stderr)
    if objective == "mlm":
        models: dict[str, Any] = {"model": DebertaForMaskedLM(config, attend)}
    else:
        models = {
            "generator": DebertaForMaskedLM(generator_config(config), attend),
            "discriminator": DebertaForRTD(config, attend, embedding_sharing="gdes"),
        }
    for model in models.values() if compiled else ():
        model.deberta.encoder.compile_layers()
    engines = {
        name: initialize_engine(model, resolved, optim=optim, lr=1e-4, horizon=Horizon(10**6))
        for name, model in models.items()
    }
    if objective == "mlm":
        return MLMObjective(**engines)
    return RTDObjective(
        **engines, embedding_sharing="gdes", num_tokens=config.vocab_size, rtd_lambda=10.0
    )


def our_step(config: DebertaConfig, batch: Batch, **options: Any) -> Callable[[], None]:
    """One optimizer step of both models on DeepSpeed engines; options of `our_objective`."""
    objective = our_objective(config, batch, **options)
    return lambda: objective.train_step([batch]) and None


def transformers_step(config: DebertaConfig, batch: Batch, *, autocast: bool) -> Callable[[], None]:
    """The same step from transformers' models and torch's AdamW."""
    import transformers  # here, so that no process holds what it does not measure

    def their_config(ours: DebertaConfig) -> transformers.DebertaV2Config:
        return transformers.DebertaV2Config(**ours.to_dict(), num_labels=1, legacy=False)

    generator = transformers.DebertaV2ForMaskedLM(their_config(generator_config(config)))
    discriminator = transformers.DebertaV2ForTokenClassification(their_config(config))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (generator, discriminator)]
    mask = batch.attention_mask
    original = batch.original_ids()
    labels = torch.full_like(original, IGNORE_INDEX).scatter(
        1, batch.predicted_positions, batch.labels
    )
    masked = labels != IGNORE_INDEX

    def update(loss: torch.Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = generator(batch.input_ids, attention_mask=mask, labels=labels)
        update(out.loss, generator, optimizers[0])
        probs = torch.softmax(out.logits.detach()[masked].float(), -1)
        corrupted = batch.input_ids.clone()
        corrupted[masked] = torch.multinomial(probs, 1).squeeze(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = discriminator(corrupted, attention_mask=mask).logits.squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits.float(), (corrupted != original).float())
        update(10.0 * loss, discriminator, optimizers[1])

    return step


CONTENDERS: dict[str, Callable[[DebertaConfig, Batch], Callable[[], None]]] = {
    "transformers fp32": partial(transformers_step, autocast=False),
    "transformers bf16 autocast": partial(transformers_step, autocast=True),
    "ours fp32": partial(our_step, ds_config="zero0_fp32"),
    "ours bf16": partial(our_step, ds_config="zero0_bf16"),
    "ours fp32 compiled": partial(our_step, ds_config="zero0_fp32", compiled=True),
    "ours bf16 compiled": partial(our_step, ds_config="zero0_bf16", compiled=True),
}
THEIRS = ("transformers fp32", "transformers bf16 autocast")


def serve(shape: str, contender: str) -> None:
    """Be one contender: for each line of standard input, run steps for a turn and tell their mean.

    At least two, after one more, which is not timed.
    """
    config, rows, length = SHAPES[shape]
    torch.manual_seed(0)
    step = CONTENDERS[contender](config, make_batch(rows, length, config.vocab_size))
    step()  # warm up
    print("ready", flush=True)
    for _ in sys.stdin:
        step()
        start, steps, seconds = time.perf_counter(), 0, 0.0
        while steps < 2 or seconds < TURN_SECONDS:
            step()
            steps += 1
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(seconds / steps, peak, flush=True)
    os._exit(0)


class Contender:
    """A process that runs steps when asked."""

    def __init__(self, shape: str, name: str) -> None:
        self.peak_bytes = 0.0
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", shape, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def take_turn(self) -> float:
        """Run steps for a turn; return the mean seconds of one, and keep the peak memory."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        seconds, peak = self._read().split()
        self.peak_bytes = float(peak)
        return float(seconds)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended with status {self._process.wait()}; see above")
        return line


def compare(shape: str, *, starts: int, rounds: int, compiled: bool) -> None:
    """Print one table row per contender, of that many turns after each of that many starts."""
    config, rows, length = SHAPES[shape]
    kinds = {"fp32": torch.float32}
    if computes_in_bf16():
        kinds["bf16"] = torch.bfloat16
    peak = dict.fromkeys(kinds, 0.0)
    flops = 3 * rows * rtd_forward_flops(config, length)
    names = [
        name
        for name in CONTENDERS
        if any(kind in name for kind in kinds) and (compiled or "compiled" not in name)
    ]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0.0)
    for start in range(starts):
        first = start * len(names) // starts
        contenders = {name: Contender(shape, name) for name in names[first:] + names[:first]}
        for _ in range(rounds):
            for kind, dtype in kinds.items():
                peak[kind] = max(peak[kind], measure_peak_flops(torch.device("cpu"), dtype))
            for name, contender in contenders.items():
                seconds[name].append(contender.take_turn())
        for name, contender in contenders.items():
            memory[name] = max(memory[name], contender.peak_bytes)
            contender.close()
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {kind}" for kind, rate in peak.items())
    only_imitated = "" if "bf16" in kinds else "; this CPU only imitates bf16, which is left out"
    print(f"\n{shape}: {rates}{only_imitated}\n")
    theirs = [name for name in THEIRS if name in names]
    print(f"| | tokens/s | ratio to {' | to '.join(theirs)} | share of the GEMM rate | memory |")
    print(f"|-|-|{'-|' * len(theirs)}-|-|")
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    for name, median in medians.items():
        ratios = " | ".join(f"{medians[other] / median:.2f}" for other in theirs)
        rate = peak["bf16" if "bf16" in name else "fp32"]
        print(
            f"| {name} | {rows * length / median:,.0f} | {ratios} | {flops / median / rate:.0%} | "
            f"{memory[name] / 2**30:.2f} GiB ({memory[name] / memory['transformers fp32']:.0%}) |"
        )


def measure_preset(args: argparse.Namespace) -> None:
    """Print one table row for each attention, then the time by part."""
    device = initialize(seed=0)
    config = MODELS[args.preset]
    batch = make_batch(args.rows, args.length, config.vocab_size).to(device)
    dtype = torch.float32 if "fp32" in args.deepspeed_config else torch.bfloat16
    peak = measure_peak_flops(device, dtype)
    count = rtd_forward_flops if args.objective == "rtd" else mlm_forward_flops
    flops = 3 * args.rows * count(config, args.length)
    tokens = args.rows * args.length
    print(
        f"\n{args.preset}, {args.objective}, {args.rows} x {args.length}, {args.deepspeed_config}: "
        f"{peak / 1e12:.1f} TFLOP/s measured\n"
    )
    print("| attention | tokens/s | share of the GEMM rate | ms, of the host | memory |")
    print("|-|-|-|-|-|")
    parts: dict[str, dict[str, float]] = {}
    for attention in args.attention.split(","):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        objective = our_objective(
            config,
            batch,
            ds_config=args.deepspeed_config,
            objective=args.objective,
            attention=attention,
            device=device.type,
            compiled=args.compile,
        )
        step = partial(objective.train_step, [batch])
        for _ in range(3):
            step()
        seconds, of_host = min(timed(step, device) for _ in range(args.steps))
        print(
            f"| {attention} | {tokens / seconds:,.0f} | {flops / seconds / peak:.0%} | "
            f"{1e3 * seconds:.1f}, {1e3 * of_host:.1f} | {peak_bytes(device) / 2**30:.2f} GiB |",
            flush=True,
        )
        parts[attention] = time_by_part(objective, batch, device, args.steps)
        if args.profile:
            print(f"\n{profile(step, device)}\n")
        del objective, step  # and their memory
    names = list(next(iter(parts.values())))
    print(f"\n| ms | {' | '.join(names)} |\n|{'-|' * (len(names) + 1)}")
    for attention, times in parts.items():
        print(f"| {attention} | {' | '.join(f'{1e3 * times[name]:.1f}' for name in names)} |")


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call, to its end on the device, and until the host was free again."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    of_host = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, of_host


def peak_bytes(device: torch.device) -> int:
    """Greatest memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TimedEngine:
    """An engine that adds up the seconds of its parts."""

    def __init__(self, name: str, engine: Engine, device: torch.device, times: dict[str, float]):
        self._name, self._engine, self._device, self._times = name, engine, device, times
        self.module = engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self._time("forward", lambda: self._engine(*args, **kwargs))

    def backward(self, loss: torch.Tensor) -> None:
        """Make the gradients."""
        self._time("backward", lambda: self._engine.backward(loss))

    def step(self) -> None:
        """Update the weights."""
        self._time("update", self._engine.step)

    def _time(self, part: str, function: Callable[[], Any]) -> Any:
        results = []
        seconds, _ = timed(lambda: results.append(function()), self._device)
        key = f"{self._name} {part}"
        self._times[key] = self._times.get(key, 0.0) + seconds
        return results[0]


def time_by_part(
    objective: Objective, batch: Batch, device: torch.device, steps: int
) -> dict[str, float]:
    """Seconds of a step's parts, each waited for, which costs a little by itself."""
    times: dict[str, float] = {}
    plain = dict(objective.engines)
    for name, engine in plain.items():
        setattr(objective, name, TimedEngine(name, engine, device, times))
    total = sum(timed(lambda: objective.train_step([batch]), device)[0] for _ in range(steps))
    for name, engine in plain.items():
        setattr(objective, name, engine)
    times["the rest"] = total - sum(times.values())
    return {name: seconds / steps for name, seconds in times.items()}


def profile(step: Callable[[], object], device: torch.device) -> str:
    """The ten most expensive operations of a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        timed(step, device)
    key = f"self_{device.type}_time_total"
    return recorded.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60)


def rtd_forward_flops(config: DebertaConfig, length: int) -> float:
    """Useful operations of one row's forward pass through both models."""
    return mlm_forward_flops(generator_config(config), length) + forward_flops(
        config, length=length, predictions=None
    )


def mlm_forward_flops(config: DebertaConfig, length: int) -> float:
    """Useful operations of one row's forward pass through a masked language model."""
    return forward_flops(config, length=length, predictions=round(MASKED * length))


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3, help="processes of each side")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each process")
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--preset", choices=MODELS, help="measure this model alone")
    parser.add_argument("--objective", choices=("rtd", "mlm"), default="rtd")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="steps to take the best of")
    on_cuda = torch.cuda.is_available()
    default = f"zero{int(on_cuda)}_{'bf16' if computes_in_bf16() else 'fp32'}"
    parser.add_argument("--attention", default="triton,reference" if on_cuda else "cpu,reference")
    parser.add_argument("--deepspeed_config", default=default)
    parser.add_argument(
        "--compile", action="store_true", help="ours compiled: also, of a preset only"
    )
    parser.add_argument("--profile", action="store_true", help="ten most expensive operations")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
    print(f"`python {' '.join(sys.argv)}`: {processor()}, torch {torch.__version__}")
    if args.preset:
        measure_preset(args)
        return
    for shape in [args.only] if args.only else SHAPES:
        compare(shape, starts=args.starts, rounds=args.rounds, compiled=args.compile)


if __name__ == "__main__":
    main()
