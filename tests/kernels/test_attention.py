"""The reference and the CPU's attention against the definition, written out in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.kernels import disentangled_attention, select_attention
from ds_deberta.kernels.cpu_attention import cpu_attention
from ds_deberta.kernels.dropout import keep_mask

BATCH, HEADS, SIZE = 2, 3, 8
TERMS = ["both", "c2p", "p2c", "none"]
both = pytest.mark.parametrize(
    "attend", [disentangled_attention, cpu_attention], ids=["reference", "cpu"]
)


def make_inputs(
    length: int, terms: str, *, queries: int | None = None, packed: bool = False, seed: int = 0
) -> dict:
    """Random inputs; any delta may use any row of the tables, so nothing rests on buckets."""
    rng = torch.Generator().manual_seed(seed)
    rows = length + 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs: dict = {
        "q": draw(BATCH, HEADS, queries or length, SIZE),
        "k": draw(BATCH, HEADS, length, SIZE),
        "v": draw(BATCH, HEADS, length, SIZE),
        "pos_key": draw(HEADS, rows, SIZE) if terms in ("both", "c2p") else None,
        "pos_query": draw(HEADS, rows, SIZE) if terms in ("both", "p2c") else None,
        "slots": None,
        "documents": torch.ones(BATCH, length, dtype=torch.bool),
        "scale": 1.0 / math.sqrt(3 * SIZE),
    }
    if terms != "none":
        limit = length + 3  # the table may know more positions than the row has
        inputs["slots"] = torch.randint(0, rows, (2 * limit - 1,), generator=rng)
    inputs["documents"][1, math.ceil(0.7 * length) :] = False
    if packed:  # up to five documents in a row
        lengths = torch.arange(length) * 5 // length + 1
        inputs["documents"] = inputs["documents"] * torch.stack([lengths, lengths // 2 + 1])
    if queries is not None:
        inputs["query_positions"] = torch.randint(0, length, (BATCH, queries), generator=rng)
    return inputs


def loop_attention(
    q, k, v, pos_key, pos_query, *, slots, documents, scale, query_positions=None
) -> Tensor:
    """One score at a time."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                position = i if query_positions is None else int(query_positions[b, i])
                own = documents[b, position]
                keys = [j for j in range(k.shape[2]) if own and documents[b, j] == own]
                scores = []
                for j in keys:
                    score = q[b, h, i] @ k[b, h, j]
                    if slots is not None:
                        row = slots[position - j + len(slots) // 2]
                        if pos_key is not None:
                            score = score + q[b, h, i] @ pos_key[h, row]
                        if pos_query is not None:
                            score = score + k[b, h, j] @ pos_query[h, row]
                    scores.append(scale * score)
                if scores:
                    rows.append(torch.stack(scores).softmax(0) @ v[b, h, keys])
                else:
                    rows.append(torch.zeros(v.shape[3], dtype=v.dtype))
    return torch.stack(rows).view(*q.shape[:3], v.shape[3])


def dense_attention(
    q, k, v, pos_key, pos_query, *, slots, documents, scale, query_positions=None, mask=1.0
) -> Tensor:
    """One table row for every pair of positions; for lengths that the loop is too slow for."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    positions = torch.arange(q.shape[2]).expand(q.shape[0], -1)
    positions = positions if query_positions is None else query_positions
    if slots is not None:
        rows = slots[positions[:, :, None] - torch.arange(k.shape[2]) + len(slots) // 2]
        for b in range(q.shape[0]):
            if pos_key is not None:
                scores[b] += torch.einsum("hid,hijd->hij", q[b], pos_key[:, rows[b]])
            if pos_query is not None:
                scores[b] += torch.einsum("hjd,hijd->hij", k[b], pos_query[:, rows[b]])
    own = documents.gather(1, positions)
    attended = (own[:, :, None] == documents[:, None]) & (documents != 0)[:, None]  # [B, L, M]
    scores = (scores * scale).masked_fill(~attended[:, None], -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) * mask) @ v


def output_and_gradients(attend, inputs: dict, dtype=torch.float64) -> dict[str, Tensor]:
    """The output, and the gradient of each float input under a fixed random loss."""
    inputs = {
        name: value.to(dtype).detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    args = [inputs.pop(name) for name in ("q", "k", "v", "pos_key", "pos_query")]
    output = attend(*args, **inputs)
    rng = torch.Generator().manual_seed(99)
    weights = torch.randn(output.shape, generator=rng, dtype=torch.float64)
    output.backward(weights.to(dtype))
    names = ("q", "k", "v", "pos_key", "pos_query")
    gradients = {
        f"grad {name}": arg.grad for name, arg in zip(names, args, strict=True) if arg is not None
    }
    return {"output": output.detach()} | gradients


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        error = (ours[name].double() - value.double()).norm() / value.double().norm()
        assert value.norm() > 0, f"{name} is zero: nothing is compared"
        assert error < tolerance, f"{name}: {error:.1e}"


@both
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("length", [1, 2, 9, 17])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_equals_the_triple_loop_with_every_gradient(attend, length: int, terms: str, packed: bool):
    inputs = make_inputs(length, terms, packed=packed)
    ours = output_and_gradients(attend, inputs)
    truth = output_and_gradients(loop_attention, inputs)
    if (
        length <= 1 + packed
    ):  # one key for each query: the softmax is constant, and so the scores have no gradient
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=0)
    else:
        assert_same(ours, truth, 1e-12)


@both
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_queries_at_given_positions_equal_the_triple_loop(
    attend, queries: int, terms: str, packed: bool
):
    inputs = make_inputs(17, terms, queries=queries, packed=packed)
    assert_same(
        output_and_gradients(attend, inputs),
        output_and_gradients(loop_attention, inputs),
        1e-12,
    )


# 129 and 257 have no blocks of rows, 300 has two, 384 has three.
@both
@pytest.mark.parametrize("length", [64, 129, 257, 300, 384])
@pytest.mark.parametrize("queries", [None, 20])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_equals_the_dense_definition_at_training_lengths(
    attend, length: int, queries: int | None, packed: bool
):
    inputs = make_inputs(length, "both", queries=queries, packed=packed)
    truth = output_and_gradients(dense_attention, inputs)
    assert_same(output_and_gradients(attend, inputs), truth, 1e-12)
    ours = output_and_gradients(attend, inputs, torch.float32)
    assert_same(ours, truth, 2e-6)


def test_the_dense_definition_equals_the_triple_loop():
    for queries in (None, 6):
        inputs = make_inputs(17, "both", queries=queries)
        truth = output_and_gradients(loop_attention, inputs)
        assert_same(output_and_gradients(dense_attention, inputs), truth, 1e-12)


@both
@pytest.mark.parametrize("queries", [None, 20])
def test_bf16_is_as_near_as_bf16_products_allow(attend, queries: int | None):
    inputs = make_inputs(256, "both", queries=queries)
    inputs = {
        name: value.bfloat16().double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    ours = output_and_gradients(attend, inputs, torch.bfloat16)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert_same(ours, output_and_gradients(dense_attention, inputs), 6e-3)


@both
@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_keys_gives_zeros_and_no_gradient(
    attend, queries: int | None, dtype: torch.dtype
):
    inputs = make_inputs(12, "both", queries=queries)
    inputs["documents"][1] = False
    ours = output_and_gradients(attend, inputs, dtype)
    assert torch.equal(ours["output"][1], torch.zeros_like(ours["output"][1]))
    for name in ("grad q", "grad k", "grad v"):
        assert torch.equal(ours[name][1], torch.zeros_like(ours[name][1]))
        assert ours[name][0].abs().max() > 0
    assert all(value.isfinite().all() for value in ours.values())


@both
def test_masked_keys_have_no_influence_at_all(attend):
    inputs = make_inputs(12, "both")
    before = output_and_gradients(attend, inputs, torch.float32)
    masked = ~inputs["documents"][:, None, :, None]
    assert masked.any()
    for name in ("k", "v"):
        inputs[name] = inputs[name].masked_fill(masked, 1e4)
    after = output_and_gradients(attend, inputs, torch.float32)
    assert torch.equal(before["output"], after["output"])
    for name in ("grad q", "grad pos_key", "grad pos_query"):
        torch.testing.assert_close(before[name], after[name], atol=1e-6, rtol=1e-6)


@both
@pytest.mark.parametrize("queries", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(attend, queries: int | None, dtype: torch.dtype):
    inputs = make_inputs(256, "both", queries=queries)
    first = output_and_gradients(attend, inputs, dtype)
    second = output_and_gradients(attend, inputs, dtype)
    assert all(torch.equal(first[name], second[name]) for name in first)


@both
def test_inputs_are_left_alone(attend):
    inputs = make_inputs(12, "both")
    copies = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    output_and_gradients(attend, inputs)
    attend(**inputs)
    assert all(torch.equal(inputs[name], value) for name, value in copies.items())


@both
def test_dropout_drops_probabilities_and_scales_the_rest(attend):
    length, p = 64, 0.25
    zeros = torch.zeros(4, 2, length, length)
    values = torch.eye(length).expand(4, 2, -1, -1)  # the output is the matrix of probabilities
    torch.manual_seed(0)
    output = attend(
        zeros,
        zeros,
        values,
        None,
        None,
        slots=None,
        documents=torch.ones(4, length, dtype=torch.bool),
        scale=1.0,
        dropout_p=p,
    )
    kept = output[output != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (length * (1 - p))))
    assert abs((output == 0).float().mean().item() - p) < 0.01


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_the_backward_of_dropout_uses_the_mask_of_the_forward(packed: bool):
    inputs = make_inputs(40, "both", packed=packed)
    torch.manual_seed(5)
    ours = output_and_gradients(partial(cpu_attention, dropout_p=0.25), inputs)
    torch.manual_seed(5)
    keep, gain = keep_mask(torch.Size((HEADS, BATCH, 40, 40)), 0.25)
    mask = keep.transpose(0, 1).double() * gain
    assert_same(ours, output_and_gradients(partial(dense_attention, mask=mask), inputs), 1e-12)


@both
@pytest.mark.parametrize("length", [1, 9, 128, 257, 384])
@pytest.mark.parametrize("queries", [None, 20])
def test_tables_in_the_order_of_delta_need_no_slots(attend, length: int, queries: int | None):
    inputs = make_inputs(length, "both", queries=queries)
    for name in ("pos_key", "pos_query"):
        inputs[name] = torch.randn(HEADS, 2 * length - 1, SIZE, dtype=torch.float64)
    inputs["slots"] = torch.arange(2 * length - 1)
    said = output_and_gradients(attend, inputs)
    unsaid = output_and_gradients(attend, inputs | {"slots": None})
    torch.testing.assert_close(unsaid, said, atol=1e-12, rtol=1e-12)


@both
def test_tables_of_another_size_need_slots(attend):
    inputs = make_inputs(9, "p2c") | {"slots": None}
    with pytest.raises(ValueError, match="a row for each delta, 17 for 9 keys; got 11"):
        attend(**inputs)


def test_rows_longer_than_the_table_equal_the_triple_loop():
    inputs = make_inputs(17, "both")
    inputs["pos_key"], inputs["pos_query"] = inputs["pos_key"][:, :5], inputs["pos_query"][:, :5]
    inputs["slots"] = inputs["slots"] % 5
    truth = output_and_gradients(loop_attention, inputs)
    assert_same(output_and_gradients(cpu_attention, inputs), truth, 1e-12)


@both
def test_plain_attention_equals_torch(attend):
    inputs = make_inputs(40, "none")
    truth = F.scaled_dot_product_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        attn_mask=inputs["documents"][:, None, None],
        scale=inputs["scale"],
    )
    truth = truth * inputs["documents"][:, None, :, None]
    torch.testing.assert_close(attend(**inputs), truth, atol=1e-12, rtol=0)


def test_select_attention_names_its_choice():
    function, reason = select_attention("auto", device="cpu", dtype=torch.float32, head_size=64)
    assert function is cpu_attention
    assert reason == "attention: cpu on cpu, float32, heads of 64: written for it"
    function, reason = select_attention(
        "reference", device=torch.device("cpu"), dtype=torch.bfloat16, head_size=8
    )
    assert function is disentangled_attention
    assert reason.endswith("as asked")
    with pytest.raises(ValueError, match="one of auto, cpu, reference, triton; got 'fast'"):
        select_attention("fast", device="cpu", dtype=torch.float32, head_size=64)


@pytest.mark.parametrize(
    ("name", "device", "missing"),
    [("triton", "cpu", "a CUDA device; got cpu"), ("cpu", "cuda", "a CPU; got cuda")],
)
def test_an_attention_that_cannot_run_says_what_is_missing(name: str, device: str, missing: str):
    with pytest.raises(ValueError, match=rf"attention {name} needs {missing}\. Use .* auto"):
        select_attention(name, device=device, dtype=torch.float32, head_size=64)
