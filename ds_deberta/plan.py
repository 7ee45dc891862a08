"""What a run will need: memory of each process, disk, steps, time. From its settings alone.

No engine is started, no weight is made, and no data is needed. The objective runs one optimizer
step on tensors without contents, and a ledger adds up what lives; the rest follows from what
DeepSpeed allocates. So the numbers move with the model's code.

Kept all the time, for P parameters, N processes and w bytes of a weight in training (4 in fp32
and under autocast, 2 in bf16 and fp16):

    | ZeRO | weights | fp32 masters | moments | gradients |
    | 0    | w P     |              | 8 P     |           |
    | 1, 2 | w P     | 4 P/N        | 8 P/N   |           |
    | 3    | w P/N   | 4 P/N        | 8 P/N   | w P/N     |

On the way, one model after the other, whichever is most:

    forward, backward   activations; gradients as long as the stage keeps them: 0 and 1 all, 2 the
                        w P/N of this process, twice if it adds up micro-batches; 3 also the
                        gathered weights, until their gradients are there
    sending             1: all gradients, and of a bucket or a larger gradient a copy
    norm                3, or offloaded: its gradients, w P/N, and the largest of them in fp64
    update              0: gradients, and a copy to send, of 5e8 numbers at most. 1 to 3: its
                        gradients three times: as received, laid flat, in fp32

Activations are counted, not estimated. `tests/test_plan.py` holds the plan against a training.

Not counted: the interpreter, torch and NCCL themselves, data workers, fragmentation.
"""

import contextlib
import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_deberta.build import (
    build_ds_configs,
    describe_evaluation,
    model_configs,
    training_flops,
)
from ds_deberta.config import PretrainConfig
from ds_deberta.data import Manifest, load_tokenizer
from ds_deberta.data.loader import Batch
from ds_deberta.distributed import plan_world_size, world_size
from ds_deberta.engine import (
    defers_table_gradient,
    describe,
    keeps_rows,
    offload_device,
    precision,
    zero_stage,
)
from ds_deberta.kernels import AttentionFn, disentangled_attention, plan_attention
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD
from ds_deberta.objectives import Objective
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from ds_deberta.resolve import describe_schedule, warnings_of

Device = Literal["cpu", "gpu"]
_SEND_AT_ONCE = 500_000_000  # numbers: DeepSpeed's all-reduce without ZeRO
_SUB_GROUP = 1_000_000_000  # numbers: ZeRO-3 updates as many at a time
_BY_PARAMETER = ("weights", "fp32 masters", "moments")  # as large as parameters are many
_TRITON_SCRATCH = 66 * 2**20  # kernels.triton_attention.WORKSPACE_BYTES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the activations of a training step."""

    objective: Literal["rtd", "mlm"]
    configs: tuple[tuple[str, DebertaConfig], ...]
    """The architecture of each engine, by name."""
    embedding_sharing: str
    rows: int
    """Of a micro-batch."""
    length: int
    predictions: int
    """Per row."""
    accumulates: bool
    """More than one micro-batch per optimizer step."""
    checkpoints_activations: bool
    attention: str
    dtype: torch.dtype
    """That products are made in."""
    autocast: bool
    """Weights stay in fp32."""
    device: Device
    rows_of_tables: bool = False
    """Gradients of tables are kept as rows, where `initialize_engine` has it so."""
    defers_table_gradient: bool = False
    """That of a head's table comes in parts, where `initialize_engine` has it so."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in training."""
        return 4 if self.autocast else self.dtype.itemsize


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process."""

    parts: dict[str, float]
    """On the device, each at its greatest."""
    total: float
    """On the device, the greatest sum at any time: gradients come as activations go."""
    host: float = 0.0
    """In CPU memory, of what is offloaded."""
    disk: float = 0.0
    """On NVMe, of what is offloaded."""


def count_parameters(shape: Shape) -> dict[str, dict[str, int]]:
    """Parameters by engine and by part: backbone, embeddings, head."""
    counts = {}
    for name, model in _build_models(shape, torch.device("meta"), disentangled_attention).items():
        parts = {"backbone": 0, "embeddings": 0, "head": 0}
        for key, parameter in model.named_parameters():
            kind = "backbone" if key.startswith("deberta.encoder.") else "head"
            kind = "embeddings" if key.startswith("deberta.embeddings.") else kind
            parts[kind] += parameter.numel()
        counts[name] = parts
    return counts


def checkpoint_bytes(shape: Shape) -> int:
    """Bytes of a checkpoint, less its small files: weights and two moments, in fp32."""
    return 12 * sum(sum(parts.values()) for parts in count_parameters(shape).values())


def exports_bytes(run: PretrainConfig, checkpoint: int) -> int:
    """Bytes of all exports of a run, the last one and those on the way: weights in fp32."""
    interval = run.train.export_interval
    on_the_way = run.train.num_training_steps // interval if interval else 0
    return checkpoint // 3 * (1 + on_the_way)


def footprint(shape: Shape, ds_config: Mapping[str, Any], processes: int) -> Footprint:
    """Memory of one process out of `processes`, under a DeepSpeed configuration."""
    trace = trace_step(shape)
    stage = zero_stage(ds_config)
    options = ds_config.get("zero_optimization", {})
    engines = {
        name: _engine_bytes(sizes, shape, ds_config, processes)
        for name, sizes in trace.sizes.items()
    }
    kept: dict[str, float] = {}
    for engine in engines.values():
        for part, count in engine.kept.items():
            kept[part] = kept.get(part, 0.0) + count
    mode = "keep" if stage < 2 else "gather" if stage == 3 and processes > 1 else "drop"
    gradients = [max(engine.backward for engine in engines.values())]
    peaks = [trace.peak[mode] + gradients[0]]
    for name, (with_gradients, without) in trace.at_update.items():
        gradients.append(engines[name].update + (0.0 if stage else with_gradients - without))
        peaks.append(without + gradients[-1])
        if stage == 1:  # all of them, until they are sent
            gradients.append(with_gradients - without + engines[name].sent)
            peaks.append(without + gradients[-1])
    scratch = _TRITON_SCRATCH if shape.device == "gpu" and shape.attention != "reference" else 0
    activations = trace.peak["drop" if mode == "keep" else mode] + scratch
    host = disk = 0.0
    for what, parts in (
        ("optimizer", ("fp32 masters", "moments", "gradient buffers")),
        ("param", ("weights",)),
    ):
        place = offload_device(ds_config, what)
        if place == "none" or stage == 0:
            continue
        moved = sum(kept.pop(part, 0.0) for part in parts)
        if what == "optimizer":  # its gradients in fp32, and the weights that go back
            moved += sum(
                (4 + shape.weight_bytes) * sum(sizes) / processes for sizes in trace.sizes.values()
            )
        if shape.device == "cpu":  # which is the host
            kept["offloaded"] = kept.get("offloaded", 0.0) + moved
        elif place == "nvme":
            disk += moved
            numbers = max(sum(sizes) / processes for sizes in trace.sizes.values())
            count = options[f"offload_{what}"].get("buffer_count", 4)
            host += count * 4 * min(numbers, _SUB_GROUP)
        else:
            host += moved
    on_the_way = {
        "gradients": max(gradients),
        "activations, gathered weights" if mode == "gather" else "activations": activations,
    }
    total = sum(kept.values()) + max(peaks) + scratch
    return Footprint(kept | on_the_way, total, host, disk)


@dataclass(frozen=True)
class _EngineBytes:
    kept: dict[str, float]
    """All the time, by part."""
    backward: float
    """More until the end of the backward pass."""
    sent: float
    """More after it, beside all gradients, while stage 1 sends them."""
    update: float
    """More while gradients are measured and weights updated; besides what the ledger knows."""


def _engine_bytes(
    sizes: tuple[int, ...], shape: Shape, ds_config: Mapping[str, Any], processes: int
) -> _EngineBytes:
    """What DeepSpeed allocates for a model whose parameters have these sizes."""
    stage, options = zero_stage(ds_config), ds_config.get("zero_optimization", {})
    w, count = shape.weight_bytes, sum(sizes)
    if stage == 0:
        copy = 4.0 * min(count, _SEND_AT_ONCE) if processes > 1 else 0.0
        return _EngineBytes({"weights": w * count, "moments": 8.0 * count}, 0.0, 0.0, copy)
    share = count / processes
    kept = {"weights": float(w * count), "fp32 masters": 4 * share, "moments": 8 * share}
    bucket = w * float(options.get("reduce_bucket_size", 5e8))
    gradients = w * share
    is_offloaded = offload_device(ds_config, "optimizer") != "none"
    norm = 8 * min(max(sizes), share) if stage == 3 or is_offloaded else 0.0
    if stage == 3:
        threshold = options.get("stage3_param_persistence_threshold", 1e5)
        kept["weights"] = w * (share + sum(size for size in sizes if size <= threshold))
        if (group := options.get("zero_hpz_partition_size", 1)) > 1:
            kept["weights"] += w * count / group
        kept["gradient buffers"] = gradients
        kept["buckets"] = bucket
        part = min(share, _SUB_GROUP)
        return _EngineBytes(kept, 0.0, 0.0, max(norm, part * (4 if w == 4 else w + 4)))
    if is_offloaded:  # room for the largest gradient on its way, and for it where it goes
        kept["buckets"] = kept["gradient buffers"] = float(w * max(sizes))
    if options.get("contiguous_gradients", True) or is_offloaded:
        backward = sent = bucket * (2 if options.get("overlap_comm") else 1)
    else:  # a copy of what is sent at a time: a bucket, or a larger gradient alone
        sent = min(w * count, max(bucket, w * max(sizes)))
        backward = 0.0 if stage == 1 else sent
    if stage == 2:
        backward += gradients * (2 if shape.accumulates else 1)
    flat = gradients if w == 4 else gradients + 4 * share
    return _EngineBytes(kept, backward, sent, gradients + max(norm, flat))


# ---- One step on tensors without contents ----

_MODES: tuple[str, ...] = ("keep", "drop", "gather")
"""What becomes of a gradient: it stays until the update; it goes; its gathered weight goes too."""


@dataclass
class Trace:
    """What one optimizer step allocates, besides weights and DeepSpeed's own buffers."""

    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Numbers in each parameter, by engine."""
    kept: dict[str, int] = field(default_factory=dict)
    """Bytes from forward to backward, by engine."""
    peak: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_MODES, 0.0))
    """Greatest sum in forward and backward, by mode."""
    at_update: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The sum when an engine updates, with and without its gradients."""


@cache
def trace_step(shape: Shape) -> Trace:
    """Run one optimizer step on tensors without contents, and add up what lives."""
    # Triton's operator knows its shapes on meta; autocast knows no meta.
    on_meta = shape.device == "gpu" and not shape.autocast
    device = torch.device("meta" if on_meta else "cpu")
    attend = _attention(shape)
    planned, trace = world_size(), Trace()
    plan_world_size(1)  # the sums over processes that the objective makes change no size
    try:
        with contextlib.nullcontext() if on_meta else FakeTensorMode():
            models = _build_models(shape, device, attend)
            ledger = Ledger(trace, device, rows_of_tables=shape.rows_of_tables)
            engines = {
                name: _PlannedEngine(name, model, shape, ledger) for name, model in models.items()
            }
            count = 2 if shape.accumulates else 1
            batches = [_batch(shape, device) for _ in range(count)]
            for engine in engines.values():
                engine.micro_batches = count
            with ledger:
                _objective(shape, engines).train_step(batches)
    finally:
        plan_world_size(planned)
    return trace


class Ledger(TorchDispatchMode):
    """Adds up the bytes of all tensors of a device made under it that are still alive.

    Args:
        trace: gets the greatest sums.
        device: whose tensors.
        rows_of_tables: the gradient of a table counts as the rows that were read. (Tensors without
            contents can not say which, and so are whole.)
    """

    def __init__(self, trace: Trace, device: torch.device, *, rows_of_tables: bool = False) -> None:
        super().__init__()
        self.trace = trace
        self._rows_of_tables = rows_of_tables
        self._device = device.type
        self.now: dict[str, float] = dict.fromkeys(_MODES, 0.0)
        self._known: set[int] = set()

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before, of which operators return views."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._rows_of_tables and func is torch.ops.aten.embedding_dense_backward.default:
            self._see(result, args[0].nbytes)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def add(self, count: float, *modes: str) -> None:
        """Count bytes that no operation of torch makes or frees here."""
        for mode in modes or _MODES:
            self.now[mode] += count
            self.trace.peak[mode] = max(self.trace.peak[mode], self.now[mode])

    def _see(self, tensor: Tensor, count: int | None = None) -> None:
        if tensor.is_sparse:
            self._see(tensor._indices())
            self._see(tensor._values())
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.device.type != self._device:
            return
        self._known.add(key)
        count = storage.nbytes() if count is None else count
        self.add(count)
        weakref.finalize(storage, self._gone, key, count)

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.add(-count)


class _PlannedEngine:
    """Follows what an engine of DeepSpeed does with gradients, for all modes at once."""

    def __init__(self, name: str, module: nn.Module, shape: Shape, ledger: Ledger) -> None:
        self.module = module
        self.micro_batches = 1
        self._name, self._shape, self._ledger = name, shape, ledger
        self._steps = 0
        self._dropped = self._released = 0.0
        parameters = list(module.parameters())
        self._weights = sum(p.nbytes for p in parameters)
        ledger.trace.sizes[name] = tuple(p.numel() for p in parameters)
        for parameter in parameters:
            ledger.leave_out(parameter)
            parameter.register_post_accumulate_grad_hook(self._drop)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self._ledger.now["keep"]
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        self._ledger.add(self._weights, "gather")
        with torch.autocast("cpu", self._shape.dtype, enabled=self._shape.autocast):
            output = self.module(*args, **kwargs)
        self._ledger.trace.kept[self._name] = int(self._ledger.now["keep"] - before)
        return output

    def backward(self, loss: Tensor) -> None:
        self._released = 0.0
        loss.backward()
        self._ledger.add(self._released - self._weights, "gather")

    def step(self) -> None:
        self._steps += 1
        if self._steps < self.micro_batches:
            return
        now = self._ledger.now
        self._ledger.trace.at_update[self._name] = (now["keep"], now["drop"])
        self._ledger.add(self._dropped, "drop", "gather")
        for parameter in self.module.parameters():
            parameter.grad = None
        if isinstance(self.module, DebertaForMaskedLM) and self.module.table_gradient:
            self.module.table_gradient.clear()

    def _drop(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # it comes in parts
            return
        self._ledger.add(-parameter.nbytes, "gather")
        self._released += parameter.nbytes
        if self._steps == 0:  # later micro-batches add to it in place
            self._ledger.add(-parameter.grad.nbytes, "drop", "gather")
            self._dropped += parameter.grad.nbytes


def _build_models(
    shape: Shape, device: torch.device, attend: AttentionFn
) -> dict[str, DebertaForMaskedLM | DebertaForRTD]:
    models: dict[str, DebertaForMaskedLM | DebertaForRTD] = {}
    sharing: Any = shape.embedding_sharing
    with device, _default_dtype(torch.float32 if shape.autocast else shape.dtype):
        for name, config in shape.configs:
            if name == "discriminator":
                models[name] = DebertaForRTD(config, attend, embedding_sharing=sharing)
            else:
                models[name] = DebertaForMaskedLM(config, attend)
    for model in models.values():
        model.deberta.encoder.checkpoint_activations = shape.checkpoints_activations
        if shape.defers_table_gradient and isinstance(model, DebertaForMaskedLM):
            model.defer_table_gradient()
    return models


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attention(shape: Shape) -> AttentionFn:
    head_size = shape.configs[0][1].head_size
    return plan_attention(shape.attention, device=shape.device, head_size=head_size)


def _batch(shape: Shape, device: torch.device) -> Batch:
    rows, predicted = (shape.rows, shape.length), (shape.rows, shape.predictions)
    return Batch(
        input_ids=torch.zeros(rows, dtype=torch.int64, device=device),
        documents=torch.ones(rows, dtype=torch.bool, device=device),
        predicted_positions=torch.zeros(predicted, dtype=torch.int64, device=device),
        labels=torch.zeros(predicted, dtype=torch.int64, device=device),
        uniforms=torch.zeros(predicted, dtype=torch.float64, device=device),
        sample_numbers=torch.zeros(shape.rows, dtype=torch.int64, device=device),
    )


def _objective(shape: Shape, engines: Mapping[str, Any]) -> Objective:
    if shape.objective == "mlm":
        return MLMObjective(engines["model"])
    sharing: Any = shape.embedding_sharing
    return RTDObjective(
        engines["generator"],
        engines["discriminator"],
        embedding_sharing=sharing,
        num_tokens=shape.configs[0][1].vocab_size,
        rtd_lambda=1.0,
    )


# ---- The table ----


def shape_of(
    run: PretrainConfig,
    configs: Mapping[str, DebertaConfig],
    ds_config: Mapping[str, Any],
    device: Device,
) -> Shape:
    """The shape of a run's training step, for `world_size` processes."""
    rows = run.train.micro_batch(world_size())
    return Shape(
        objective=run.objective,
        configs=tuple(configs.items()),
        embedding_sharing=run.model.embedding_sharing,
        rows=rows,
        length=run.data.row_length,
        predictions=round(run.data.mask_prob * run.data.row_length),
        accumulates=run.train.train_batch_size > rows * world_size(),
        checkpoints_activations=run.model.activation_checkpointing,
        attention=run.model.attention,
        dtype=precision(ds_config),
        autocast=ds_config.get("torch_autocast", {}).get("enabled", False),
        device=device,
        rows_of_tables=device == "cpu" and keeps_rows(ds_config),
        defers_table_gradient=device == "cpu" and defers_table_gradient(ds_config),
    )


def plan(run: PretrainConfig, device: Device, tokens_per_second: float | None) -> Iterator[str]:
    """Say what a run of `expect_world_size` processes will need, line by line, as Markdown.

    Raises:
        ValueError: settings that do not go together; the same that end the run itself.
    """
    processes = run.expect_world_size or 1
    plan_world_size(processes)
    describe_schedule(run)
    has_data = (run.data.data_dir / "manifest.json").is_file()
    configs = model_configs(run, load_tokenizer(run.data.data_dir) if has_data else None)
    ds_config = next(iter(build_ds_configs(run, configs, runs_here=False).values()))
    shape = shape_of(run, configs, ds_config, device)
    yield from _lines_of_size(run, shape, configs)
    yield from _lines_of_memory(run, shape, configs, ds_config, processes)
    yield from _lines_of_time(run, configs, has_data, tokens_per_second)


def _lines_of_size(
    run: PretrainConfig,
    shape: Shape,
    configs: Mapping[str, DebertaConfig],
) -> Iterator[str]:
    yield f"\n| {run.model.model} | backbone | embeddings | head | all |\n|-|-|-|-|-|"
    for name, parts in count_parameters(shape).items():
        numbers = " | ".join(f"{count / 1e6:,.1f} M" for count in parts.values())
        yield f"| {name} | {numbers} | {sum(parts.values()) / 1e6:,.1f} M |"
    vocabulary = next(iter(configs.values())).vocab_size
    size, keep = checkpoint_bytes(shape), run.train.keep_checkpoints
    kept = (
        f"{keep} are kept, room for {keep + 1}: {_gib((keep + 1) * size)}" if keep else "all kept"
    )
    yield f"\nVocabulary: {vocabulary:,} rows. A checkpoint: {_gib(size)}; {kept}."
    all_exports = exports_bytes(run, size)
    together = f"; all of them: {_gib(all_exports)}" if run.train.export_interval else ""
    yield f"An export: {_gib(size / 3)}{together}."
    if run.train.save_in_background:
        copy = _gib(size / world_size())
        yield f"While it is written, each process holds a copy of its share in CPU memory: {copy}."


def _lines_of_memory(
    run: PretrainConfig,
    shape: Shape,
    configs: Mapping[str, DebertaConfig],
    ds_config: Mapping[str, Any],
    processes: int,
) -> Iterator[str]:
    stage = zero_stage(ds_config)
    yield (
        f"\nMemory of each of {processes} processes on a {shape.device.upper()}, "
        f"{run.deepspeed_config} ({describe(ds_config)['precision']}), micro-batches of "
        f"{shape.rows} x {shape.length}:\n"
    )
    chosen = footprint(shape, ds_config, processes)
    counts = count_parameters(shape).values()
    share = sum(c["embeddings"] for c in counts) / sum(sum(c.values()) for c in counts)
    yield "| part, at its greatest | | of it embeddings |\n|-|-|-|"
    for part, count in chosen.parts.items():
        embeddings = _gib(share * count) if part in _BY_PARAMETER else ""
        yield f"| {part} | {_gib(count)} | {embeddings} |"
    yield f"| **together, at any time** | **{_gib(chosen.total)}** | |"
    for name, count in (("CPU memory", chosen.host), ("NVMe", chosen.disk)):
        if count:
            yield f"| beside it, {name} | {_gib(count)} | |"
    kept = ", ".join(f"{name} {_gib(count)}" for name, count in trace_step(shape).kept.items())
    stays = f"of the activations stay from forward to backward: {kept}"
    yield f"\nGradients come as activations go; {stays}.\n"

    sizes = {}
    for count in (processes // 2, processes, 2 * processes):
        with contextlib.suppress(ValueError, ZeroDivisionError):  # where the batch can be cut so
            plan_world_size(count)
            sizes[count] = shape_of(run, configs, ds_config, shape.device)
    plan_world_size(processes)
    stages = range(1 if shape.weight_bytes == 2 else 0, 4)
    yield f"| processes | {' | '.join(f'ZeRO {each}' for each in stages)} |"
    yield f"|-|{'-|' * len(stages)}"
    for count, other in sizes.items():
        totals = (
            _gib(footprint(other, _at_stage(ds_config, each), count).total)
            + (" (this run)" if (each, count) == (stage, processes) else "")
            for each in stages
        )
        yield f"| {count} ({other.rows} rows at a time) | {' | '.join(totals)} |"


def _at_stage(ds_config: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """The same configuration in another stage, without what only stage 3 has."""
    options = dict(ds_config.get("zero_optimization", {})) | {"stage": stage}
    if stage != zero_stage(ds_config):
        only_there = ("offload_param", "zero_hpz_partition_size")
        options = {name: value for name, value in options.items() if name not in only_there}
        if offload_device(ds_config, "optimizer") == "nvme":
            del options["offload_optimizer"]
        options["contiguous_gradients"] = stage > 1  # as in ds_configs/
    return dict(ds_config) | {"zero_optimization": options}


def _lines_of_time(
    run: PretrainConfig,
    configs: Mapping[str, DebertaConfig],
    has_data: bool,
    tokens_per_second: float | None,
) -> Iterator[str]:
    steps, rows = run.train.num_training_steps, run.train.train_batch_size
    tokens = steps * rows * run.data.row_length
    flops = training_flops(run, configs) * steps * rows
    line = f"\n{steps:,} steps x {rows} rows x {run.data.row_length} = {tokens:.3g} tokens, "
    yield f"{line}{flops:.3g} floating-point operations."
    for warning in warnings_of(run):
        yield f"Warning: {warning}"
    if has_data:
        train = Manifest.load(run.data.data_dir).splits["train"]
        epochs = steps * rows / max(1, train.rows)
        yield f"{epochs:,.2f} epochs over the {train.rows:,} rows of {run.data.data_dir}."
        yield f"Each evaluation: {describe_evaluation(run)}."
    else:
        yield f"There is no data at {run.data.data_dir}: the preset's own vocabulary, no epochs."
    source = "--tokens_per_second"
    if tokens_per_second is None:
        source = str(run.output_dir / "metrics.jsonl")
        tokens_per_second = _last_speed(run.output_dir / "metrics.jsonl")
    if tokens_per_second is None:
        yield "Time: give --tokens_per_second, of all processes together."
    else:
        seconds = tokens / tokens_per_second
        minutes = run.train.max_minutes
        if minutes and 60 * minutes < seconds:
            steps, seconds = int(60 * minutes * steps / seconds), 60 * minutes
            yield f"It ends after {minutes:g} minutes (--max_minutes): {steps:,} steps."
        yield (
            f"Time: {seconds / 86400:,.1f} days, {seconds / 3600:,.1f} hours, at "
            f"{tokens_per_second:,.0f} tokens/s ({source})."
        )


def _last_speed(metrics: Path) -> float | None:
    if not metrics.is_file():
        return None
    for line in reversed(metrics.read_bytes().splitlines()):
        try:
            speed = json.loads(line)["tokens_per_second"]
            return float(speed)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # of something else, or cut short by a crash
    return None


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"
