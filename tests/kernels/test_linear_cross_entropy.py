"""The vocabulary head in chunks against the plain product, softmax and cross-entropy."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_deberta.kernels import TableGradient, linear_cross_entropy

# The function of this name hides the module from an ordinary import.
MODULE = importlib.import_module("ds_deberta.kernels.linear_cross_entropy")
ROWS, SIZE, VOCAB = 23, 48, 1003
NUM_TOKENS = 901  # neither it nor the vocabulary is a number of whole blocks


@pytest.fixture(params=["one chunk, kept", "chunks, kept", "chunks, made again"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if "chunks" in request.param:
        monkeypatch.setitem(MODULE.CHUNK_ELEMENTS, "cpu", 130 * ROWS)  # 2 blocks
    if "made again" in request.param:
        monkeypatch.setattr(MODULE, "KEPT_BYTES", 0)
    return request.param


def make_inputs(dtype: torch.dtype, *, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, ...]:
    """Logits of about +-7, labels of which some are -100, uniform numbers."""
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, SIZE, generator=rng, dtype=torch.float64)
    weight = 0.3 * torch.randn(VOCAB, SIZE, generator=rng, dtype=torch.float64)
    bias = torch.randn(VOCAB, generator=rng, dtype=torch.float64)
    labels = torch.randint(VOCAB, (rows,), generator=rng)
    labels[::5] = -100
    labels[1], labels[2] = 0, VOCAB - 1
    uniforms = torch.rand(rows, generator=rng, dtype=torch.float64)
    leaves = (x.to(dtype).requires_grad_() for x in (states, weight, bias))
    return *leaves, labels, uniforms


def plain_loss(states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(states, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="sum")


def plain_samples(logits: Tensor, uniforms: Tensor, num_tokens: int, temperature: float) -> Tensor:
    probs = torch.softmax(logits[:, :num_tokens].detach().double() / temperature, -1).numpy()
    drawn = []
    for row, uniform in zip(probs, uniforms.numpy(), strict=True):
        cumulative = np.cumsum(row)
        drawn.append(np.searchsorted(cumulative, uniform * cumulative[-1], "right"))
    return torch.tensor(np.array(drawn))


def gradients_of(loss: Tensor, inputs: tuple[Tensor, ...], upstream: float) -> list[Tensor]:
    return list(torch.autograd.grad(loss * upstream, inputs[:3]))


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def in_float64(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return *(x.detach().double().requires_grad_() for x in inputs[:3]), *inputs[3:]


def test_fp32_loss_and_gradients_equal_float64(chunking: str):
    inputs = make_inputs(torch.float32)
    exact = in_float64(inputs)
    loss, truth = linear_cross_entropy(*inputs).loss, plain_loss(*exact[:4])
    assert loss.dtype == torch.float32
    assert error(loss, truth) < 1e-6
    for found, expected in zip(
        gradients_of(loss, inputs, 0.37), gradients_of(truth, exact, 0.37), strict=True
    ):
        assert found.dtype == torch.float32
        assert error(found, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_the_plain_head(chunking: str, dtype: torch.dtype):
    inputs = make_inputs(dtype)
    exact = in_float64(inputs)
    loss, plain, truth = (
        linear_cross_entropy(*inputs).loss,
        plain_loss(*inputs[:4]),
        plain_loss(*exact[:4]),
    )
    assert abs(loss - plain) < 1e-6 * plain  # the same rounded logits
    for found, usual, expected in zip(
        gradients_of(loss, inputs, 8.0),
        gradients_of(plain, inputs, 8.0),
        gradients_of(truth, exact, 8.0),
        strict=True,
    ):
        assert found.dtype == dtype
        assert error(found, expected) < 1.5 * error(usual, expected)


def test_sums_over_a_large_vocabulary_stay_within_fp16():
    """Embeddings of 1 and equal logits: over all ids the sum of exponentials would be 80,000."""
    states = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    weight, bias = torch.ones(80_000, 4, dtype=torch.float16), torch.zeros(80_000)
    weight[7] = -1.0
    linear_cross_entropy(states, weight, bias.half(), torch.tensor([7])).loss.backward()
    torch.testing.assert_close(states.grad, torch.full_like(states, 2.0))


def test_gradients_are_those_of_finite_differences(chunking: str):
    inputs = make_inputs(torch.float64, rows=4)

    def loss(*leaves: Tensor) -> Tensor:
        return linear_cross_entropy(*leaves, *inputs[3:], num_tokens=NUM_TOKENS).loss

    assert torch.autograd.gradcheck(loss, inputs[:3], fast_mode=True)


def test_predictions_are_the_greatest_logits_of_live_ids(chunking: str):
    states, weight, bias, labels, _ = make_inputs(torch.float32, rows=400)
    logits = F.linear(states, weight, bias)
    output = linear_cross_entropy(states, weight, bias, labels, num_tokens=NUM_TOKENS)
    assert torch.equal(output.predictions, logits[:, :NUM_TOKENS].argmax(-1))
    assert not torch.equal(output.predictions, logits.argmax(-1))
    assert output.samples is None
    whole = linear_cross_entropy(states, weight, bias, labels)
    assert torch.equal(whole.predictions, logits.argmax(-1))


def test_of_equal_logits_the_first_is_predicted(chunking: str):
    inputs = make_inputs(torch.float32)
    states, weight, bias = (torch.zeros_like(x) for x in inputs[:3])
    bias[[40, 700, 950]] = 1.0
    assert (linear_cross_entropy(states, weight, bias, inputs[3]).predictions == 40).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_invert_the_cumulative_distribution(chunking: str, temperature: float):
    """Draws lie apart by more than rounding, so that any chunks give the same ones."""
    states, weight, bias, labels, uniforms = make_inputs(torch.float32, rows=400)
    output = linear_cross_entropy(
        states, weight, bias, labels, uniforms, num_tokens=NUM_TOKENS, temperature=temperature
    )
    logits = F.linear(states.double(), weight.double(), bias.double())
    truth = plain_samples(logits, uniforms, NUM_TOKENS, temperature)
    assert (output.samples != truth).sum() <= 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(chunking: str, temperature: float):
    """Chi-square over 40,000 draws of 170 tokens; 99.99% quantile for 169 degrees 245."""
    draws, num_tokens = 40_000, 170
    rng = torch.Generator().manual_seed(5)
    states = torch.ones(draws, 1)
    weight, bias = torch.randn(200, 1, generator=rng), torch.randn(200, generator=rng)
    bias[num_tokens:] = 5.0
    uniforms = torch.rand(draws, generator=rng, dtype=torch.float64)
    labels = torch.zeros(draws, dtype=torch.int64)
    drawn = linear_cross_entropy(
        states, weight, bias, labels, uniforms, num_tokens=num_tokens, temperature=temperature
    ).samples
    logits = (weight[:, 0] + bias)[:num_tokens].double()
    expected = torch.softmax(logits / temperature, -1) * draws
    counts = torch.bincount(drawn, minlength=num_tokens)
    assert len(counts) == num_tokens
    assert ((counts - expected) ** 2 / expected).sum() < 245


def test_the_ends_of_the_uniform_range_draw_tokens_that_have_a_probability(chunking: str):
    """Where almost all logits are so low that their probability is zero."""
    bias = torch.full((VOCAB,), -1e4)
    bias[[130, 131, 600, NUM_TOKENS]] = 0.0  # the last is a padding row
    states, weight = torch.zeros(ROWS, SIZE), torch.zeros(VOCAB, SIZE)
    labels = torch.zeros(ROWS, dtype=torch.int64)

    def draw(uniform: float) -> set[int]:
        uniforms = torch.full((ROWS,), uniform, dtype=torch.float64)
        output = linear_cross_entropy(states, weight, bias, labels, uniforms, num_tokens=NUM_TOKENS)
        assert output.samples is not None
        return set(output.samples.tolist())

    assert draw(0.0) == {130}
    assert draw(0.5) == {131}
    assert draw(math.nextafter(1.0, 0.0)) == {600}


def test_padding_rows_that_outweigh_all_tokens_are_neither_predicted_nor_drawn(chunking: str):
    states, weight, bias, labels, uniforms = make_inputs(torch.float32)
    with torch.no_grad():
        bias[NUM_TOKENS:] = 1000.0
    output = linear_cross_entropy(states, weight, bias, labels, uniforms, num_tokens=NUM_TOKENS)
    truth = plain_samples(F.linear(states, weight, bias), uniforms, NUM_TOKENS, 1.0)
    assert torch.equal(output.samples, truth)
    live = F.linear(states, weight, bias)[:, :NUM_TOKENS].argmax(-1)
    assert torch.equal(output.predictions, live)
    alone = linear_cross_entropy(states, weight, bias, labels, num_tokens=NUM_TOKENS)
    assert torch.equal(alone.predictions, live)


def test_a_diverged_model_draws_tokens_of_the_vocabulary(chunking: str):
    """What follows must be able to say that the loss is NaN."""
    states, weight, bias, labels, uniforms = make_inputs(torch.float32)
    output = linear_cross_entropy(
        states * torch.nan, weight, bias, labels, uniforms, num_tokens=NUM_TOKENS
    )
    assert output.loss.isnan()
    assert output.samples.min() >= 0
    assert output.samples.max() < NUM_TOKENS


def test_a_tied_table_gets_both_gradients(chunking: str):
    states, weight, bias, labels, _ = make_inputs(torch.float64)
    ids = labels.clamp(min=0)
    (found,) = torch.autograd.grad(
        linear_cross_entropy(F.embedding(ids, weight) + states, weight, bias, labels).loss, weight
    )
    (truth,) = torch.autograd.grad(
        plain_loss(F.embedding(ids, weight) + states, weight, bias, labels), weight
    )
    torch.testing.assert_close(found, truth)


def test_a_second_backward_pass_gives_the_same_bits(chunking: str):
    inputs = make_inputs(torch.bfloat16)
    loss = linear_cross_entropy(*inputs).loss
    first = torch.autograd.grad(loss, inputs[:3], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs[:3])))


def test_autocast_multiplies_in_bf16_and_returns_fp32_gradients(chunking: str):
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear_cross_entropy(*inputs)
    low = tuple(x.detach().bfloat16().requires_grad_() for x in inputs[:3])
    truth = linear_cross_entropy(*low, *inputs[3:])
    assert torch.equal(output.loss, truth.loss)
    assert torch.equal(output.predictions, truth.predictions)
    assert torch.equal(output.samples, truth.samples)
    for found, rounded in zip(
        gradients_of(output.loss, inputs, 1.0), gradients_of(truth.loss, low, 1.0), strict=True
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.bfloat16(), rounded)


def test_evaluation_equals_training(chunking: str):
    inputs = make_inputs(torch.float32)
    with torch.no_grad():
        output = linear_cross_entropy(*inputs)
    truth = linear_cross_entropy(*inputs)
    assert not output.loss.requires_grad
    assert all(map(torch.equal, output, truth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_table_s_gradient_can_come_in_parts(chunking: str, dtype: torch.dtype):
    """The parts are the table's gradient as it would be, and all else is the same: to the bit, but
    where the whole one's exponentials are made again, for those that are kept are rounded.
    """
    inputs = make_inputs(torch.float32, rows=SIZE // 4)
    gradient = TableGradient(inputs[1])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        whole = linear_cross_entropy(*inputs, num_tokens=NUM_TOKENS)
        parts = linear_cross_entropy(*inputs, num_tokens=NUM_TOKENS, table_gradient=gradient)
    assert all(map(torch.equal, whole, parts))
    states, weight, bias = gradients_of(whole.loss, inputs, 0.37)
    (parts.loss * 0.37).backward()
    assert torch.equal(inputs[0].grad, states)
    assert inputs[1].grad is None
    table = torch.cat([block.clone() for _, block in gradient.blocks(100)])
    if "kept" in chunking:
        assert torch.equal(inputs[2].grad, bias)
        torch.testing.assert_close(table, weight)
    assert error(inputs[2].grad, bias) < torch.finfo(dtype).eps
    assert error(table, weight) < torch.finfo(dtype).eps


def test_a_table_s_gradient_of_many_rows_comes_as_a_whole(chunking: str):
    inputs = make_inputs(torch.float32, rows=SIZE // 4 + 1)
    gradient = TableGradient(inputs[1])
    linear_cross_entropy(*inputs, table_gradient=gradient).loss.backward()
    assert gradient.is_empty
    (truth,) = torch.autograd.grad(linear_cross_entropy(*inputs).loss, inputs[1])
    assert torch.equal(inputs[1].grad, truth)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.elements = max(self.elements, elements)
        return result


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_no_tensor_of_rows_times_vocabulary_is_made(
    monkeypatch: pytest.MonkeyPatch, temperature: float
):
    """States are so small that the largest tensor is the gradient of the table."""
    monkeypatch.setattr(MODULE, "KEPT_BYTES", 0)
    monkeypatch.setitem(MODULE.CHUNK_ELEMENTS, "cpu", 2**14)
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(256, 8, generator=rng).requires_grad_()
    weight = torch.randn(4096, 8, generator=rng).requires_grad_()
    bias = torch.zeros(4096, requires_grad=True)
    labels = torch.randint(4096, (256,), generator=rng)
    uniforms = torch.rand(256, dtype=torch.float64, generator=rng)
    with LargestTensor() as plain:
        plain_loss(states, weight, bias, labels).backward()
    with LargestTensor() as ours:
        inputs = (states, weight, bias, labels, uniforms)
        linear_cross_entropy(*inputs, temperature=temperature).loss.backward()
    assert plain.elements == 256 * 4096
    assert ours.elements == weight.numel()


def test_what_may_be_predicted_does_not_change_a_bit_of_the_loss(chunking: str):
    inputs = make_inputs(torch.float32)[:4]
    found = []
    for num_tokens in (None, NUM_TOKENS):
        loss = linear_cross_entropy(*inputs, num_tokens=num_tokens).loss
        found.append([loss, *gradients_of(loss, inputs, 0.37)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
