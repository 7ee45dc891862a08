"""The Triton kernels against a dense float64 definition: on a GPU, or in Triton's interpreter.

The interpreter multiplies bf16 wrongly, so bf16 is for GPUs only.
"""

import inspect
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton", reason="triton is not installed")

from ds_deberta.kernels import triton_attention  # noqa: E402
from ds_deberta.kernels.triton_attention import Tile, Tiles, disentangled_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKERS = Path(__file__).parent.parent / "workers"
NAMES = ("q", "k", "v", "pos_key", "pos_query")
ROWS = 11  # of the position tables
BIG = Tiles(*[Tile(128, 64, 8, 1)] * 5)  # fewer steps for the interpreter


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; its tensors follow from it."""

    length: int = 40
    size: int = 32
    batch: int = 2
    terms: str = "both"
    documents: str = "padded"
    queries: int | None = None
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, object], ...] = (("tiles", BIG),)

    def __str__(self) -> str:
        queries = f"-{self.queries}-queries" if self.queries else ""
        dtype = str(self.dtype).removeprefix("torch.")
        drop = f"-drop-{self.dropout_p}" if self.dropout_p else ""
        return f"{dtype}-{self.length}x{self.size}-{self.terms}-{self.documents}{queries}{drop}"


def make_documents(case: Case) -> Tensor:
    """[B, M] document numbers: int64, in no special order, some with holes of padding."""
    documents = torch.ones(case.batch, case.length, dtype=torch.int64)
    third = case.length // 3
    if case.documents == "padded":
        documents[-1, math.ceil(0.7 * case.length) :] = 0
    elif case.documents == "empty":
        documents[-1] = 0
    elif case.documents == "packed":
        documents[0] = torch.arange(case.length) * 5 // case.length + 1
        documents[-1, :third] = 9
        documents[-1, third : third + 5] = 0
        documents[-1, 2 * third :] = 4
    elif case.documents == "holes":  # the second holds whole tiles of the kernels
        documents[0, third : third + 3] = 0
        documents[-1, 3 : max(4, case.length - 7)] = 0
    return documents


def make_inputs(case: Case) -> dict:
    """Values that fp16 and bf16 hold exactly, in float64."""
    rng = torch.Generator().manual_seed(0)
    heads = 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).bfloat16().half().double().to(DEVICE)

    limit = case.length + 3  # the table may know more positions than the row has
    slots = torch.randint(0, ROWS, (2 * limit - 1,), generator=rng).sort().values
    inputs = {
        "q": draw(case.batch, heads, case.queries or case.length, case.size),
        "k": draw(case.batch, heads, case.length, case.size),
        "v": draw(case.batch, heads, case.length, case.size),
        "pos_key": draw(heads, ROWS, case.size) if case.terms in ("both", "c2p") else None,
        "pos_query": draw(heads, ROWS, case.size) if case.terms in ("both", "p2c") else None,
        "slots": None if case.terms == "none" else slots.to(DEVICE),
        "documents": make_documents(case).to(DEVICE),
        "scale": 1.0 / math.sqrt(3 * case.size),
    }
    if case.queries is not None:  # in no order, and many at 0
        positions = torch.randint(0, case.length, (case.batch, case.queries), generator=rng)
        positions[:, case.queries // 2 :] = 0
        inputs["query_positions"] = positions.to(DEVICE)
    return inputs


def dense_attention(
    q, k, v, pos_key, pos_query, *, slots, documents, scale, query_positions=None, keep=None
) -> Tensor:
    """The definition, with every score in memory."""
    length, keys = q.shape[2], k.shape[2]
    if query_positions is None:
        query_positions = torch.arange(length, device=q.device).expand(q.shape[0], -1)
    scores = q @ k.transpose(-1, -2)  # [B, H, L, M]
    if slots is not None:
        delta = query_positions[:, :, None] - torch.arange(keys, device=q.device)
        rows = slots[delta + len(slots) // 2][:, None].expand(-1, q.shape[1], -1, -1)
        if pos_key is not None:
            scores = scores + (q @ pos_key.transpose(-1, -2)).gather(-1, rows)
        if pos_query is not None:
            p2c = (k @ pos_query.transpose(-1, -2)).gather(-1, rows.transpose(-1, -2))
            scores = scores + p2c.transpose(-1, -2)
    mine = documents.gather(1, query_positions)[:, None, :, None]
    same = (mine == documents[:, None, None]) & (mine != 0)  # [B, 1, L, M]
    probs = (scores * scale).masked_fill(~same, -1e30).softmax(-1) * same
    if keep is not None:
        probs = probs * keep
    return probs @ v


def output_and_gradients(attend, inputs: dict, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The output, and the gradient of each float input under a fixed random loss."""
    args = [
        None if inputs[name] is None else inputs[name].to(dtype).requires_grad_() for name in NAMES
    ]
    others = {name: value for name, value in inputs.items() if name not in NAMES}
    torch.manual_seed(1)  # the seed of the dropout
    output = attend(*args, **others, **options)
    rng = torch.Generator().manual_seed(99)
    weights = torch.randn(output.shape, generator=rng).bfloat16().half().to(DEVICE)
    output.backward(weights.to(dtype))
    grads = {f"grad {n}": a.grad for n, a in zip(NAMES, args, strict=True) if a is not None}
    return {"output": output.detach()} | grads


def ours(case: Case) -> dict[str, Tensor]:
    return output_and_gradients(
        disentangled_attention,
        make_inputs(case),
        case.dtype,
        dropout_p=case.dropout_p,
        **dict(case.options),
    )


def keep_of(case: Case) -> Tensor | None:
    """What multiplies the probabilities that `ours` drops from."""
    if not case.dropout_p:
        return None
    torch.manual_seed(1)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
    shape = (case.batch, 2, case.queries or case.length, case.length)
    mask = triton_attention.keep_mask(seed, case.dropout_p, shape)
    return mask / (1 - round(case.dropout_p * 65536) / 65536)


def truth(case: Case) -> dict[str, Tensor]:
    return output_and_gradients(
        dense_attention, make_inputs(case), torch.float64, keep=keep_of(case)
    )


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, f"{name} is zero: nothing is compared"
        error = (actual[name].double() - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


FP16 = torch.float16
OWN_BLOCKS = ()  # options: the blocks of the table
CASES = [
    Case(length=16, options=OWN_BLOCKS),
    Case(length=17, size=128, documents="holes", options=OWN_BLOCKS),
    Case(length=64, size=64, dropout_p=0.1, options=OWN_BLOCKS),
    Case(length=77, size=32, documents="packed", dropout_p=0.3),
    Case(length=77, size=64, terms="c2p"),
    Case(length=77, size=32, terms="p2c", documents="empty"),
    Case(length=40, size=32, terms="none", documents="packed", options=OWN_BLOCKS),
    Case(length=128, size=64, documents="packed"),
    Case(length=300, size=32, documents="packed", dropout_p=0.1),
    Case(length=77, size=32, queries=20, documents="packed", dropout_p=0.1),
    Case(length=77, size=64, queries=1, documents="full"),
    Case(length=140, size=32, queries=70, documents="holes"),
    Case(length=77, size=32, queries=20, terms="c2p"),
    Case(length=77, size=32, queries=20, terms="p2c"),
    Case(length=40, size=32, queries=20, terms="none"),
    Case(length=16, size=64, dtype=FP16, options=OWN_BLOCKS),
    Case(length=64, size=128, dtype=FP16, documents="packed", dropout_p=0.1, options=OWN_BLOCKS),
    Case(length=77, size=64, dtype=FP16, documents="holes", dropout_p=0.1, options=OWN_BLOCKS),
    Case(length=128, size=128, dtype=FP16, options=OWN_BLOCKS),
    Case(length=300, size=64, batch=1, dtype=FP16, documents="holes", options=OWN_BLOCKS),
    Case(length=150, size=64, dtype=FP16, queries=45, documents="packed", dropout_p=0.1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition_with_every_gradient(case: Case):
    assert_near(ours(case), truth(case), 1e-5 if case.dtype == torch.float32 else 1e-3)


def test_one_position_attends_to_itself():
    case = Case(length=1, documents="full")  # a constant softmax: scores have no gradient
    torch.testing.assert_close(ours(case), truth(case), atol=2e-6, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("queries", [None, 20])
def test_tables_in_the_order_of_delta_need_no_slots(queries: int | None):
    case = Case(length=77, documents="packed", queries=queries, dropout_p=0.1)
    inputs, said = make_inputs(case), []
    for name in ("pos_key", "pos_query"):
        inputs[name] = inputs[name][:, torch.arange(2 * case.length - 1) % ROWS]
    for slots in (torch.arange(2 * case.length - 1, device=DEVICE), None):
        inputs["slots"] = slots
        said.append(
            output_and_gradients(
                disentangled_attention, inputs, case.dtype, dropout_p=0.1, tiles=BIG
            )
        )
    assert_same_bits(*said)


def test_tables_of_another_size_need_slots():
    inputs = make_inputs(Case(length=9)) | {"slots": None}
    with pytest.raises(ValueError, match=f"a row for each delta, 17 for 9 keys; got {ROWS}"):
        disentangled_attention(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1100, 2100])
def test_long_rows_of_short_documents(length: int):
    """Most tiles are skipped."""
    case = Case(length=length, batch=1, dtype=FP16)
    inputs = make_inputs(case)
    inputs["documents"] = torch.arange(length, device=DEVICE)[None] // 150 + 1
    deltas = torch.arange(1 - length, length, device=DEVICE)
    inputs["slots"] = (deltas // 20 + ROWS // 2).clamp(0, ROWS - 1)
    actual = output_and_gradients(disentangled_attention, inputs, FP16, tiles=BIG)
    assert_near(actual, output_and_gradients(dense_attention, inputs, torch.float64), 1e-3)


@pytest.mark.parametrize("queries", [None, 20])
def test_padding_gives_zeros_and_no_gradient(queries: int | None):
    case = Case(length=77, documents="holes", queries=queries, dropout_p=0.1)
    inputs, results = make_inputs(case), ours(case)
    padding = inputs["documents"] == 0
    at_queries = padding if queries is None else padding.gather(1, inputs["query_positions"])
    assert padding.any()
    for name, rows in (
        ("output", at_queries),
        ("grad q", at_queries),
        ("grad k", padding),
        ("grad v", padding),
    ):
        values = results[name].transpose(1, 2)  # [B, L, H, D]
        assert (values[rows] == 0).all(), name
        assert values[~rows].abs().sum() > 0, name


@pytest.mark.parametrize(
    "case",
    [
        Case(length=77, documents="packed", dropout_p=0.1),
        Case(length=100, documents="holes", dtype=FP16),
        Case(length=77, documents="packed", queries=20),
    ],
    ids=str,
)
def test_nothing_unwritten_is_read(case: Case, monkeypatch: pytest.MonkeyPatch):
    clean = ours(case)

    def poisoned(shape, like, dtype=None):
        dtype = dtype or like.dtype
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(shape, poison, dtype=dtype, device=like.device)

    monkeypatch.setattr(triton_attention, "_fresh", poisoned)
    assert_same_bits(ours(case), clean)


@pytest.mark.parametrize("queries", [None, 6])
def test_chunks_make_no_difference(queries: int | None):
    case = Case(length=20, batch=3, queries=queries, dropout_p=0.1)
    one_pair = replace(case, options=(*case.options, ("workspace_bytes", 1)))
    some_pairs = replace(case, options=(*case.options, ("workspace_bytes", 30_000)))
    whole = ours(case)
    assert_same_bits(ours(one_pair), whole)
    assert_same_bits(ours(some_pairs), whole)


def test_chunks_cover_each_pair_once_within_the_bound():
    for batch, heads, limit in [(1, 1, 1), (5, 3, 2), (5, 3, 7), (32, 12, 46), (2, 12, 100)]:
        chunks = list(triton_attention._chunks(batch, heads, limit * 10, 10))
        pairs = [
            (sample, head)
            for chunk in chunks
            for head in range(chunk.first_head, chunk.first_head + chunk.heads)
            for sample in range(chunk.first_sample, chunk.first_sample + chunk.batch)
        ]
        assert sorted(pairs) == [(b, h) for b in range(batch) for h in range(heads)]
        assert max(chunk.batch * chunk.heads for chunk in chunks) <= limit


def run_worker(name: str, tmp_path: Path, *args: str) -> Any:
    """Return what it reports; another process, for here kernels may be interpreted."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(WORKERS.parent.parent)
    report = tmp_path / "report.json"
    command = [sys.executable, str(WORKERS / name), str(report), *args]
    subprocess.run(command, env=environment, check=True)
    return json.loads(report.read_text())


@pytest.mark.parametrize(("batch", "length", "most"), [(32, 512, 40), (128, 128, 16)])
def test_a_pass_is_few_launches_in_little_scratch(batch, length, most, monkeypatch):
    launched, cuts = [], []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, _grid):
            return lambda *_args, **_options: launched.append(self.name)

    def recording_cut(*args, **kwargs):
        cuts.append(cut(*args, **kwargs))
        return cuts[-1]

    cut = triton_attention._cut
    monkeypatch.setattr(triton_attention, "_cut", recording_cut)
    for name in vars(triton_attention):
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_attention, name, Recorder(name))
    states = torch.zeros(batch, 12, length, 64, dtype=torch.bfloat16, requires_grad=True)
    table = torch.zeros(12, 512, 64, dtype=torch.bfloat16, requires_grad=True)
    output = disentangled_attention(
        *(states, states, states, table, table),
        slots=torch.zeros(2 * length - 1, dtype=torch.int64),
        documents=torch.ones(batch, length, dtype=torch.int32),
        scale=1.0,
        dropout_p=0.1,
    )
    output.backward(torch.zeros_like(output))
    assert len(launched) <= most
    for chunks, scratch in cuts:
        memory = {x.data_ptr(): x for x in scratch if x is not None}
        assert len(chunks) > 1
        assert len(memory) == 3  # c2p, p2c and the dropout; the gradients take their places
        assert sum(x.nbytes for x in memory.values()) <= triton_attention.WORKSPACE_BYTES


@pytest.mark.skipif(DEVICE == "cuda", reason="chunks are compared there")
def test_the_chunks_after_the_first_are_launched_with_the_same_arguments(tmp_path: Path):
    first, second = run_worker("launch_attention.py", tmp_path)
    assert first.pop("looked up") is True
    assert second.pop("looked up") is False
    assert (first.pop("first_head"), second.pop("first_head")) == (0, 1)
    assert len(first["args"]) == 10
    assert first == second


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has an order of its own")
@pytest.mark.parametrize("queries", [None, 20])
def test_the_programs_of_a_launch_may_run_in_any_order(queries, monkeypatch):
    """None reads what another one writes, though scores and their gradients share memory."""
    from triton.runtime.interpreter import InterpreterBuilder

    case = Case(length=77, queries=queries, documents="packed", dropout_p=0.1, options=OWN_BLOCKS)
    clean, mirrored = ours(case), 0
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def backwards(builder, *place: int) -> None:
        nonlocal mirrored
        mirrored += max(builder.grid_dim) > 1
        pairs = zip(builder.grid_dim, place, strict=True)
        set_grid_idx(builder, *(size - 1 - i for size, i in pairs))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    assert_same_bits(ours(case), clean)
    assert mirrored > 10


def test_two_runs_give_the_same_bits():
    case = Case(length=77, documents="packed", dropout_p=0.1, dtype=FP16)
    assert_same_bits(ours(case), ours(case))


def test_states_may_be_views_and_stay_as_they_are():
    case = Case(length=40)
    inputs = make_inputs(case)
    views = inputs | {
        name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"
    }
    copies = {name: value.clone() for name, value in views.items() if isinstance(value, Tensor)}
    results = output_and_gradients(disentangled_attention, views, torch.float32, tiles=BIG)
    assert_same_bits(results, ours(case))
    assert all(torch.equal(views[name], value) for name, value in copies.items())


def test_dropout_keeps_its_share_and_draws_each_place_on_its_own():
    seeds = [torch.tensor([n], device=DEVICE) for n in (1, 2**62)]
    masks = [triton_attention.keep_mask(seed, 0.1, (3, 4, 70, 100)).float() for seed in seeds]
    for mask in masks:
        assert mask.shape == (3, 4, 70, 100)
        assert abs(mask.mean().item() - 0.9) < 0.004  # 4 standard deviations
        assert (mask.mean((2, 3)) - 0.9).abs().max() < 0.02
    streams = torch.cat(masks).flatten(0, 1).flatten(1)  # [seeds and pairs, places]
    assert torch.corrcoef(streams).fill_diagonal_(0).abs().max() < 0.06
    rows, columns = streams.view(-1, 70, 100), streams.view(-1, 70, 100).transpose(1, 2)
    for lines in (rows, columns):
        neighbours = torch.stack([lines[:, :-1].flatten(), lines[:, 1:].flatten()])
        assert torch.corrcoef(neighbours)[0, 1].abs() < 0.015


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_at_the_ends_of_its_range(p: float):
    mask = triton_attention.keep_mask(torch.tensor([3], device=DEVICE), p, (2, 2, 40, 64))
    assert abs(mask.float().mean().item() - (1 - p)) < 0.03
    if p == 1.0:
        assert (ours(Case(length=16, dropout_p=1.0))["output"] == 0).all()


def test_a_checkpointed_layer_draws_the_same_dropout_again():
    case = Case(length=40, dropout_p=0.3)

    def checkpointed(*args, **options):
        return checkpoint(disentangled_attention, *args, use_reentrant=False, **options)

    results = output_and_gradients(
        checkpointed, make_inputs(case), torch.float32, dropout_p=case.dropout_p, tiles=BIG
    )
    assert_same_bits(results, ours(case))


def op_arguments(case: Case) -> tuple:
    inputs = make_inputs(case)
    tensors = [
        None if inputs[name] is None else inputs[name].to(case.dtype).requires_grad_()
        for name in NAMES
    ]
    seed = torch.tensor([5], device=DEVICE) if case.dropout_p else None
    others = (inputs["slots"], inputs["documents"], inputs.get("query_positions"), seed)
    return *tensors, *others, inputs["scale"], case.dropout_p, 2**20, [n for x in BIG for n in x]


@pytest.mark.parametrize(
    "case",
    [
        Case(length=20, batch=1, dropout_p=0.1),
        Case(length=20, batch=1, terms="p2c", queries=6),
        Case(length=20, batch=1, terms="none"),
    ],
    ids=str,
)
def test_the_operators_are_what_torch_expects(case: Case):
    torch.library.opcheck(triton_attention.attention_forward, op_arguments(case))
    *tensors, scale, dropout_p, workspace_bytes, tiles = op_arguments(case)
    out, lse = triton_attention.attention_forward(
        *tensors, scale, dropout_p, workspace_bytes, tiles
    )
    tensors = [None if x is None else x.detach() for x in tensors]
    saved = (*tensors, out.detach(), lse.detach())
    torch.library.opcheck(
        triton_attention.attention_backward,
        (torch.ones_like(out), *saved, scale, dropout_p, workspace_bytes, tiles),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("queries", [None, 6])
def test_compiles_into_one_graph(queries: int | None):
    # Inductor draws from a generator of its own.
    case = Case(length=20, queries=queries, dropout_p=0.0 if DEVICE == "cuda" else 0.1)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(disentangled_attention, fullgraph=True, backend=backend)
    results = output_and_gradients(
        compiled, make_inputs(case), torch.float32, dropout_p=case.dropout_p, tiles=BIG
    )
    assert_same_bits(results, ours(case))


def test_autocast_chooses_the_dtype_of_the_products():
    case = Case(length=40, size=64)
    with torch.autocast(DEVICE, dtype=FP16):
        results = ours(case)
    assert results["output"].dtype == FP16
    assert results["grad q"].dtype == torch.float32
    assert_near(results, truth(case), 1e-3)


def test_kernels_annotate_nothing_but_constants():
    """A plain type would switch off what the compiler knows of a number: that 16 divides it."""
    kernels = [getattr(value, "fn", None) for value in vars(triton_attention).values()]
    kernels = [fn for fn in kernels if inspect.isfunction(fn)]
    assert len(kernels) > 10
    for kernel in kernels:
        for parameter in inspect.signature(kernel).parameters.values():
            assert parameter.annotation in (inspect.Parameter.empty, triton.language.constexpr)


def assert_fit_for_tensor_cores(report: dict[str, dict[str, dict[str, int]]]) -> None:
    for case, kernels in report.items():
        hopper = case.startswith("sm_90")
        assert len(kernels) == 8
        for name, facts in kernels.items():
            what = f"{case} {name}: {facts}"
            assert facts["stack"] == 0, what
            assert facts["2 bytes"] == 0, what  # skewed columns move in pairs
            assert facts["shared"] <= (227 if hopper else 163) * 1024, what
            if "spans" not in name and "dots" not in name:
                assert facts["HGMMA" if hopper else "HMMA"] > 0, what


def test_the_usual_blocks_compile_for_hopper_without_spills(tmp_path: Path):
    cases = ["sm_90 bfloat16 64 0.1 full", "sm_90 bfloat16 64 0.1 short"]
    assert_fit_for_tensor_cores(run_worker("compile_attention.py", tmp_path, *cases))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_all_16_bit_blocks_compile_without_spills(arch: str, dtype: str, tmp_path: Path):
    cases = [
        f"{arch} {dtype} {size} {p} full"
        for size in triton_attention.HEAD_SIZES
        for p in (0.0, 0.1)
    ]
    assert_fit_for_tensor_cores(run_worker("compile_attention.py", tmp_path, *cases))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_queries_of_odd_lengths_compile(arch: str, tmp_path: Path):
    cases = [f"{arch} bfloat16 64 0.1 odd", f"{arch} float32 64 0.1 odd"]
    report = run_worker("compile_attention.py", tmp_path, *cases)
    assert all(len(kernels) == 8 for kernels in report.values())
