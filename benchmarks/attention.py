"""Disentangled attention alone: every implementation at hand, forward and backward, one table.

    python benchmarks/attention.py [--shapes 32x12x512] [--only triton,eager] [--minutes 5]
    python benchmarks/attention.py --shapes 32x12x512,128x12x128 --only triton --workspaces 33 132

Each contender is first compared with a float64 definition; if one of ours fails, the status is 1.
They run in turns; times are medians, with a cold L2 cache. TFLOP/s counts 2U + 2G forward and
5U + 6G backward, where U = 2 B H L^2 D and G = 2 B H L R D; its share is that of the best large
matrix product of the same run. Without CUDA, a few small shapes and what runs on a CPU.

A call is timed with the host's work for it, which a training hides as long as it is the shorter
one; "host" is that work alone. "GPU" is forward and backward replayed as a CUDA graph, without a
host; a contender that waits for the device has none. Rates are of the graph, else of calls. Ratios
are of graph to graph, or of call to call where either side has no graph.

"70%": rows are padded to lengths between 40% and 100%. FlashDeBERTa has no dropout at all, and
plain SDPA no positions: it is the lower bound, with the operations that it has.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.distributed import computes_in_bf16, initialize
from ds_deberta.kernels import disentangled_attention as reference
from ds_deberta.metrics import measure_peak_flops, processor
from ds_deberta.model.presets import MODELS
from ds_deberta.model.relative import slot_table

SIZE = 64
SHAPES = ["32x12x512", "128x12x128", "32x12x128", "16x12x1024", "32x12x1024", "8x12x2048"]
SHAPES += ["32x12x2048", "32x4x512", "32x16x512", "256x12x512"]
CPU_SHAPES = ["8x4x128", "4x6x128", "2x12x512"]
SECONDS = {"cpu": 1.0, "cuda": 0.1}  # for each contender and problem, and again for replays
OURS = ["triton", "reference", "cpu"]
LOWER_BOUND = "SDPA, no positions"
CONFIG = MODELS["deberta-v3-base"]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Problem(NamedTuple):
    """One attention."""

    q: Tensor  # [B, H, L, D]
    k: Tensor
    v: Tensor
    pos_key: Tensor  # [H, R, D]
    pos_query: Tensor
    slots: Tensor  # [2 * L - 1]
    documents: Tensor  # [B, L]
    scale: float
    dropout_p: float
    is_padded: bool

    @property
    def states(self) -> tuple[Tensor, ...]:
        """What has gradients."""
        return self[:5]

    @property
    def options(self) -> dict:
        """The keyword arguments of our functions."""
        return {name: getattr(self, name) for name in ("slots", "documents", "scale", "dropout_p")}


def make_problem(shape: str, fill: float, dropout_p: float, dtype, device: str) -> Problem:
    """Random inputs; heads are views into rows, as a model makes them."""
    batch, heads, length = map(int, shape.split("x"))
    rng = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng, device=device).to(dtype)

    def leaf(states: Tensor) -> Tensor:
        return states.detach().requires_grad_()

    states = [leaf(draw(batch, length, heads, SIZE).transpose(1, 2)) for _ in range(3)]
    tables = [leaf(draw(512, heads, SIZE).transpose(0, 1)) for _ in range(2)]
    lengths = torch.full((batch,), length, device=device)
    if fill < 1:
        lengths = (length * torch.linspace(2 * fill - 1, 1, batch, device=device)).long()
    documents = (torch.arange(length, device=device) < lengths[:, None]).int()
    slots = slot_table(CONFIG, length).to(device)
    scale = 1 / math.sqrt(3 * SIZE)
    return Problem(*states, *tables, slots, documents, scale, dropout_p, is_padded=fill < 1)


def bias(problem: Problem) -> Tensor:
    """Both position terms, by gathering: [B, H, L, L]."""
    q, k, _, pos_key, pos_query = problem.states
    positions = torch.arange(q.shape[2], device=q.device)
    rows = problem.slots[positions[:, None] - positions + len(problem.slots) // 2]
    rows = rows.expand(*q.shape[:2], -1, -1)
    c2p = (q @ pos_key.transpose(-1, -2)).gather(-1, rows)
    p2c = (k @ pos_query.transpose(-1, -2)).gather(-1, rows.transpose(-1, -2))
    return c2p + p2c.transpose(-1, -2)


def key_mask(problem: Problem) -> Tensor:
    """[B, 1, 1, L]."""
    return problem.documents.bool()[:, None, None]


def run_eager(problem: Problem) -> Tensor:
    """As transformers: products, gathers, softmax, dropout."""
    q, k, v = problem.states[:3]
    scores = (q @ k.transpose(-1, -2) + bias(problem)) * problem.scale
    scores = scores.masked_fill(~key_mask(problem), torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(-1), problem.dropout_p) @ v


def run_dense_bias(problem: Problem) -> Tensor:
    """The position terms as the mask of a stock kernel."""
    lowest = torch.finfo(problem.q.dtype).min
    mask = (bias(problem) * problem.scale).masked_fill(~key_mask(problem), lowest)
    return F.scaled_dot_product_attention(
        *problem.states[:3], attn_mask=mask, dropout_p=problem.dropout_p, scale=problem.scale
    )


def run_plain(problem: Problem) -> Tensor:
    """Neither positions nor padding."""
    return F.scaled_dot_product_attention(
        *problem.states[:3], dropout_p=problem.dropout_p, scale=problem.scale
    )


def run_reference(problem: Problem) -> Tensor:
    """The plain torch of this project."""
    return reference(*problem.states, **problem.options)


def run_triton(problem: Problem, **tuning: int) -> Tensor:
    """The Triton kernels of this project."""
    from ds_deberta.kernels import triton_attention

    return triton_attention.disentangled_attention(*problem.states, **problem.options, **tuning)


def run_cpu(problem: Problem) -> Tensor:
    """This project's function for the CPU."""
    from ds_deberta.kernels.cpu_attention import cpu_attention

    return cpu_attention(*problem.states, **problem.options)


def run_flex(problem: Problem) -> Tensor:
    """PyTorch's FlexAttention, compiled, over both position scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if problem.dropout_p:
        raise NotImplementedError("no dropout")
    q, k, v, pos_key, pos_query = problem.states
    c2p, p2c = q @ pos_key.transpose(-1, -2), k @ pos_query.transpose(-1, -2)
    slots, documents, middle = problem.slots, problem.documents, len(problem.slots) // 2

    def score_mod(score, b, h, i, j):
        row = slots[i - j + middle]
        score = score + (c2p[b, h, i, row] + p2c[b, h, j, row]) * problem.scale
        return torch.where(documents[b, j] != 0, score, -math.inf)

    return compiled(flex_attention)(q, k, v, score_mod=score_mod, scale=problem.scale)


def run_flash_deberta(problem: Problem) -> Tensor:
    """The package flashdeberta 0.0.8, where installed."""
    from flashdeberta.ops.flash_attention import flash_attention_with_disentangled

    if problem.dropout_p:
        raise NotImplementedError("no dropout")
    q, k, v, pos_key, pos_query = problem.states
    lengths = problem.documents.sum(1, dtype=torch.int32)
    return flash_attention_with_disentangled(
        *(q, k, v, lengths, pos_key[None], pos_query[None]),
        sm_scale=problem.scale,
        position_buckets=256,
        max_relative_distance=512,
    )


def run_disentangled_flash(problem: Problem) -> Tensor:
    """The package disentangled-flash 1.1.1, where installed, in blocks of its own choice."""
    from disentangled_flash import tuning
    from disentangled_flash.position import SharedPositionPlanCache, pad_position_table
    from disentangled_flash.training._kernels import training_attention

    if "plans" not in CACHE:
        CACHE["plans"] = SharedPositionPlanCache(
            position_buckets=256, max_relative_positions=512, position_embedding_size=256
        )
        registry = tuning.ProfileRegistry.from_options(tuning.KernelTuningOptions())
        CACHE["registry"] = tuning.register_profile_registry(registry)
    batch, heads, length, _ = problem.q.shape
    plan = CACHE["plans"].compact(length, problem.q.device)

    def config(phase: str) -> tuning.KernelConfig:  # as its modules, by profile or rule
        workload = (
            *(tuning.length_family(length), SIZE, tuning.occupancy_family(batch * heads)),
            *(plan.active_slots.numel(), str(problem.q.dtype)[6:], True, True, "strict"),
            *("padded", problem.is_padded, phase, problem.dropout_p > 0),
        )
        device = torch.cuda.current_device()
        return tuning.KernelConfig(
            *tuning.resolve_launch_config(
                CACHE["registry"], "auto", device, workload, batch * heads
            )
        )

    tables = (pad_position_table(x[:, plan.active_slots]) for x in problem.states[3:])
    out = training_attention(
        *problem.states[:3],
        *tables,
        plan.delta_to_local,
        problem.documents.bool(),
        score_scale=problem.scale,
        has_padding=problem.is_padded,
        strict_fp32=True,
        forward_config=config("training_forward"),
        dq_config=config("backward_dq"),
        dkv_config=config("backward_dkv"),
        dropout_p=problem.dropout_p,
        gradient_band=plan.gradient_band,
    )  # [B, L, H * D]
    return out.unflatten(2, (heads, SIZE)).transpose(1, 2)


CACHE: dict = {}


def compiled(function: Callable) -> Callable:
    """Compile once, for all shapes."""
    if function not in CACHE:
        # Or else the ninth kind of input would be run as if it was not compiled, silently.
        torch._dynamo.config.recompile_limit = 100
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        CACHE[function] = torch.compile(function)
    return CACHE[function]


CONTENDERS: dict[str, Callable[[Problem], Tensor]] = {
    "triton": run_triton,
    "reference": run_reference,
    "cpu": run_cpu,
    "eager": run_eager,
    "eager, compiled": lambda problem: compiled(run_eager)(problem),
    "dense bias + SDPA": run_dense_bias,
    "FlexAttention": run_flex,
    "FlashDeBERTa": run_flash_deberta,
    "DisentangledFlash": run_disentangled_flash,
    LOWER_BOUND: run_plain,
}
ON_CPU = ("cpu", "reference", "eager", "dense bias + SDPA", LOWER_BOUND)


def check(run: Callable[[Problem], Tensor], shape: str, fill: float, dtype, device: str) -> None:
    """Compare output and gradients with float64, without dropout and for one sample and head."""
    length = shape.split("x")[2]
    problem = make_problem(f"2x1x{length}", fill, 0.0, dtype, device)
    exact = problem._replace(
        **{
            name: x.detach().double().requires_grad_()
            for name, x in zip(Problem._fields, problem.states, strict=False)
        }
    )
    is_token = problem.documents.bool()[:, None, :, None]
    results = []
    for each, function in ((problem, run), (exact, run_eager)):
        out = function(each) * is_token
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, SIZE, device=device).to(out))
        results.append([out, *(x.grad for x in each.states)])
    for ours, truth in zip(*results, strict=True):
        error = ((ours.double() - truth).norm() / truth.norm()).item()
        if not error < TOLERANCE[dtype]:
            raise ArithmeticError(f"wrong: error {error:.1e}")


def milliseconds(function: Callable[[], object], device: str, flush: Tensor) -> tuple[float, float]:
    """Time of a call, and what the host took of it; on CUDA after a flush of the L2 cache."""
    flush.zero_()
    if device == "cpu":
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        return 1e3 * seconds, 1e3 * seconds
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]), 1e3 * seconds


def replayed(function: Callable[[], object], flush: Tensor) -> float:
    """Median milliseconds of a CUDA graph of a call; NaN where it can not be one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}".splitlines()[0], file=sys.stderr)
        return math.nan
    times = []
    stop = time.perf_counter() + SECONDS["cuda"]
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 100):
        times.append(milliseconds(graph.replay, "cuda", flush)[0])
    return statistics.median(times[2:])


class Times(NamedTuple):
    """Medians of a contender, in ms."""

    forward: float  # a call
    total: float  # a call, forward and backward
    host: float  # of that
    gpu: float  # forward and backward as a graph; NaN: not known
    ratio: float  # of eager's time to this one
    peak: float  # MB beyond the inputs

    @property
    def best(self) -> float:
        """What rates are counted by."""
        return self.total if math.isnan(self.gpu) else self.gpu


def measure(names: list[str], problem: Problem) -> dict[str, Times]:
    """Time contenders in turns, so that a noisy machine slows all of them."""
    device = problem.q.device.type
    flush = torch.empty(2**28 if device == "cuda" else 0, dtype=torch.int8, device=device)
    grad = torch.ones_like(problem.v)

    def both(name: str) -> None:
        output = CONTENDERS[name](problem)
        torch.autograd.grad(output, problem.states, grad, allow_unused=True)

    forward: dict[str, list[float]] = {name: [] for name in names}
    total: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + SECONDS[device] * len(names)
    turns = 0
    while turns < 5 or (time.perf_counter() < stop and turns < 100):
        for name in names:
            run = CONTENDERS[name]
            forward[name].append(milliseconds(lambda r=run: r(problem), device, flush)[0])
            call, of_host = milliseconds(lambda n=name: both(n), device, flush)
            total[name].append(call)
            host[name].append(of_host)
        turns += 1
    results = {}
    for name in names:
        gpu, ratio = math.nan, math.nan
        if device == "cuda":
            gpu = replayed(lambda n=name: both(n), flush)
            torch.cuda.empty_cache()  # a graph's memory is its own
        elif "eager" in total:
            pairs = zip(total["eager"][2:], total[name][2:], strict=True)
            ratio = statistics.median(eager / ours for eager, ours in pairs)
        medians = (statistics.median(times[name][2:]) for times in (forward, total, host))
        peak = peak_memory(lambda n=name: both(n), problem)
        results[name] = Times(*medians, gpu=gpu, ratio=ratio, peak=peak)
    if device == "cuda" and (eager := results.get("eager")):
        for name, x in results.items():
            ratio = eager.gpu / x.gpu
            results[name] = x._replace(ratio=eager.total / x.total if math.isnan(ratio) else ratio)
    return results


def peak_memory(function: Callable[[], object], problem: Problem) -> float:
    """Bytes / 10^6 that a call needs beyond its inputs; known on CUDA only."""
    if problem.q.device.type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def flops(problem: Problem, has_positions: bool) -> float:
    """Of a forward and a backward pass."""
    batch, heads, length, size = problem.q.shape
    rows = problem.slots.unique().numel() if has_positions else 0
    return 2 * batch * heads * length * size * (7 * length + 8 * rows)


def describe(times: Times, flops: float, peak_flops: float) -> list[str]:
    """The cells of a contender's row."""
    rate = 1e3 * flops / times.best
    on_cuda = [f"{times.host:.3f}", "" if math.isnan(times.gpu) else f"{times.gpu:.3f}"]
    return [
        *(f"{times.forward:.3f}", f"{times.total:.3f}"),
        *([] if math.isnan(times.peak) else on_cuda),
        *(f"{rate / 1e12:.3g}", f"{rate / peak_flops:.0%}"),
        "" if math.isnan(times.peak) else f"{times.peak:.0f}",
        f"{times.ratio:.2f}",
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES if device == "cuda" else CPU_SHAPES
    parser.add_argument("--shapes", default=",".join(shapes), help="batch x heads x length, ...")
    parser.add_argument("--only", default=None, help="contenders, separated by commas")
    parser.add_argument(
        "--workspaces", type=int, nargs="+", default=[], help="MiB of scratch for triton"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no further problem after them"
    )
    on_cpu = "bfloat16,float32" if computes_in_bf16() else "float32"
    parser.add_argument("--dtypes", default="bfloat16,float16" if device == "cuda" else on_cpu)
    options = parser.parse_args()
    names = [name for name in CONTENDERS if name != "cpu"] if device == "cuda" else list(ON_CPU)
    if options.only:
        if absent := set(options.only.split(",")) - set(names):
            parser.error(f"--only: {', '.join(absent)} can not run here; {', '.join(names)} can")
        names = [name for name in names if name in options.only.split(",")]
    if options.workspaces and device == "cpu":
        parser.error("--workspaces: triton can not run here")
    for size in options.workspaces:
        name = f"triton, {size} MiB"
        CONTENDERS[name] = partial(run_triton, workspace_bytes=size * 2**20)
        OURS.append(name)
        names.append(name)
    end = time.perf_counter() + 60 * options.minutes
    initialize(seed=0)
    print(f"`python {' '.join(sys.argv)}`: {processor()}, torch {torch.__version__}")
    print(f"\nShapes are B x H x L, heads of {SIZE}.\n")
    columns = ("shape", "dtype", "fill", "dropout", "contender", "ms fwd", "ms fwd+bwd")
    columns += ("ms host", "ms GPU") if device == "cuda" else ()
    columns += ("TFLOP/s", "share of peak", "peak MB", "times as fast as eager")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    broken: list[str] = []
    peaks = {dtype: measure_peak_flops(torch.device(device), dtype) for dtype in dtypes}
    left_out = []
    for dtype, shape, fill, p in itertools.product(
        dtypes, options.shapes.split(","), (1.0, 0.7), (0.1, 0.0)
    ):
        if time.perf_counter() > end:
            left_out.append(f"{shape} {str(dtype)[6:]} {fill:.0%} {p}")
            continue
        problem = make_problem(shape, fill, p, dtype, device)
        failures: dict[str, str] = {}
        for name in names:
            try:
                if name != LOWER_BOUND:
                    check(CONTENDERS[name], shape, fill, dtype, device)
                output = CONTENDERS[name](problem).sum()
                torch.autograd.grad(output, problem.states, allow_unused=True)
            except Exception as error:  # a contender that fails is a row of the table
                failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:60]
                if name in OURS and not isinstance(error, torch.OutOfMemoryError):
                    broken.append(f"{name}, {shape}, {dtype}: {error}")
        times = measure([name for name in names if name not in failures], problem)
        for name in names:
            head = f"| {shape} | {str(dtype)[6:]} | {fill:.0%} | {p} | {name} "
            if name in failures:
                cells = [failures[name].replace("|", "/")]
            else:
                cells = describe(times[name], flops(problem, name != LOWER_BOUND), peaks[dtype])
            cells += [""] * (len(columns) - 5 - len(cells))
            print(f"{head}| {' | '.join(cells)} |", flush=True)
    if left_out:
        print(f"\nNot measured, for {options.minutes} minutes were over: {', '.join(left_out)}.")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
