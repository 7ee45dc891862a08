"""The reference against the definition, written out literally in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.kernels import disentangled_attention, select_attention

BATCH, HEADS, SIZE, ROWS = 2, 3, 8, 11
TERMS = ["both", "c2p", "p2c", "none"]


def make_inputs(length: int, terms: str, *, queries: int | None = None, seed: int = 0) -> dict:
    """Random inputs; any delta may use any row of the tables, so nothing rests on buckets."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs: dict = {
        "q": draw(BATCH, HEADS, queries or length, SIZE),
        "k": draw(BATCH, HEADS, length, SIZE),
        "v": draw(BATCH, HEADS, length, SIZE),
        "pos_key": draw(HEADS, ROWS, SIZE) if terms in ("both", "c2p") else None,
        "pos_query": draw(HEADS, ROWS, SIZE) if terms in ("both", "p2c") else None,
        "slots": None,
        "key_mask": torch.ones(BATCH, length, dtype=torch.bool),
        "scale": 1.0 / math.sqrt(3 * SIZE),
    }
    if terms != "none":
        limit = length + 3  # the table may know more positions than the row has
        inputs["slots"] = torch.randint(0, ROWS, (2 * limit - 1,), generator=rng)
    inputs["key_mask"][1, math.ceil(0.7 * length) :] = False
    if queries is not None:
        inputs["query_positions"] = torch.randint(0, length, (BATCH, queries), generator=rng)
    return inputs


def loop_attention(
    q, k, v, pos_key, pos_query, *, slots, key_mask, scale, query_positions=None
) -> Tensor:
    """One score at a time."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                position = i if query_positions is None else int(query_positions[b, i])
                keys = [j for j in range(k.shape[2]) if key_mask[b, j]]
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
    q, k, v, pos_key, pos_query, *, slots, key_mask, scale, query_positions=None
) -> Tensor:
    """One table row for every pair of positions; for lengths that the loop is too slow for."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    if slots is not None:
        positions = torch.arange(q.shape[2]).expand(q.shape[0], -1)
        positions = positions if query_positions is None else query_positions
        rows = slots[positions[:, :, None] - torch.arange(k.shape[2]) + len(slots) // 2]
        for b in range(q.shape[0]):
            if pos_key is not None:
                scores[b] += torch.einsum("hid,hijd->hij", q[b], pos_key[:, rows[b]])
            if pos_query is not None:
                scores[b] += torch.einsum("hjd,hijd->hij", k[b], pos_query[:, rows[b]])
    scores = (scores * scale).masked_fill(~key_mask[:, None, None], -math.inf)
    return scores.softmax(-1) @ v


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


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("length", [1, 2, 9, 17])
def test_equals_the_triple_loop_with_every_gradient(length: int, terms: str):
    inputs = make_inputs(length, terms)
    ours = output_and_gradients(disentangled_attention, inputs)
    truth = output_and_gradients(loop_attention, inputs)
    if length == 1:  # one key: the softmax is constant, and so the scores have no gradient
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=0)
    else:
        assert_same(ours, truth, 1e-12)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("queries", [1, 6])
def test_queries_at_given_positions_equal_the_triple_loop(queries: int, terms: str):
    inputs = make_inputs(17, terms, queries=queries)
    assert_same(
        output_and_gradients(disentangled_attention, inputs),
        output_and_gradients(loop_attention, inputs),
        1e-12,
    )


# 129 and 257 have no blocks of rows, 300 has two, 384 has three.
@pytest.mark.parametrize("length", [64, 129, 257, 300, 384])
@pytest.mark.parametrize("queries", [None, 20])
def test_equals_the_dense_definition_at_training_lengths(length: int, queries: int | None):
    inputs = make_inputs(length, "both", queries=queries)
    truth = output_and_gradients(dense_attention, inputs)
    assert_same(output_and_gradients(disentangled_attention, inputs), truth, 1e-12)
    ours = output_and_gradients(disentangled_attention, inputs, torch.float32)
    assert_same(ours, truth, 2e-6)


def test_the_dense_definition_equals_the_triple_loop():
    for queries in (None, 6):
        inputs = make_inputs(17, "both", queries=queries)
        truth = output_and_gradients(loop_attention, inputs)
        assert_same(output_and_gradients(dense_attention, inputs), truth, 1e-12)


@pytest.mark.parametrize("queries", [None, 20])
def test_bf16_is_as_near_as_bf16_products_allow(queries: int | None):
    inputs = make_inputs(256, "both", queries=queries)
    inputs = {
        name: value.bfloat16().double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    ours = output_and_gradients(disentangled_attention, inputs, torch.bfloat16)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert_same(ours, output_and_gradients(dense_attention, inputs), 6e-3)


@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_keys_gives_zeros_and_no_gradient(queries: int | None, dtype: torch.dtype):
    inputs = make_inputs(12, "both", queries=queries)
    inputs["key_mask"][1] = False
    ours = output_and_gradients(disentangled_attention, inputs, dtype)
    assert torch.equal(ours["output"][1], torch.zeros_like(ours["output"][1]))
    for name in ("grad q", "grad k", "grad v"):
        assert torch.equal(ours[name][1], torch.zeros_like(ours[name][1]))
        assert ours[name][0].abs().max() > 0
    assert all(value.isfinite().all() for value in ours.values())


def test_masked_keys_have_no_influence_at_all():
    inputs = make_inputs(12, "both")
    before = output_and_gradients(disentangled_attention, inputs, torch.float32)
    masked = ~inputs["key_mask"][:, None, :, None]
    assert masked.any()
    for name in ("k", "v"):
        inputs[name] = inputs[name].masked_fill(masked, 1e4)
    after = output_and_gradients(disentangled_attention, inputs, torch.float32)
    assert torch.equal(before["output"], after["output"])
    for name in ("grad q", "grad pos_key", "grad pos_query"):
        torch.testing.assert_close(before[name], after[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("queries", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(queries: int | None, dtype: torch.dtype):
    inputs = make_inputs(256, "both", queries=queries)
    first = output_and_gradients(disentangled_attention, inputs, dtype)
    second = output_and_gradients(disentangled_attention, inputs, dtype)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_are_left_alone():
    inputs = make_inputs(12, "both")
    copies = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    output_and_gradients(disentangled_attention, inputs)
    disentangled_attention(**inputs)
    assert all(torch.equal(inputs[name], value) for name, value in copies.items())


def test_dropout_drops_probabilities_and_scales_the_rest():
    length, p = 64, 0.25
    zeros = torch.zeros(4, 2, length, length)
    values = torch.eye(length).expand(4, 2, -1, -1)  # the output is the matrix of probabilities
    torch.manual_seed(0)
    output = disentangled_attention(
        zeros,
        zeros,
        values,
        None,
        None,
        slots=None,
        key_mask=torch.ones(4, length, dtype=torch.bool),
        scale=1.0,
        dropout_p=p,
    )
    kept = output[output != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (length * (1 - p))))
    assert abs((output == 0).float().mean().item() - p) < 0.01


def test_plain_attention_equals_torch():
    inputs = make_inputs(40, "none")
    truth = F.scaled_dot_product_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        attn_mask=inputs["key_mask"][:, None, None],
        scale=inputs["scale"],
    )
    torch.testing.assert_close(disentangled_attention(**inputs), truth, atol=1e-12, rtol=0)


def test_select_attention_names_its_choice():
    function, reason = select_attention(
        "auto", device=torch.device("cpu"), dtype=torch.float32, head_size=64
    )
    assert function is disentangled_attention
    assert "reference" in reason
    assert "\n" not in reason
    with pytest.raises(ValueError, match="one of auto, reference, triton; got 'fast'"):
        select_attention("fast", device="cpu", dtype=torch.float32, head_size=64)


def test_triton_where_it_cannot_run_says_what_is_missing():
    with pytest.raises(ValueError, match=r"a CUDA device; got cpu\. Use --attention auto"):
        select_attention("triton", device="cpu", dtype=torch.float32, head_size=64)
