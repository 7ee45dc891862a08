"""A table's gradient in parts against the same one as a whole."""

import pytest
import torch
from torch import Tensor

from ds_deberta.kernels import TableGradient, table_gradient

HEIGHT, WIDTH = 23, 8


@pytest.fixture(params=[5, 2**13], ids=["measured in parts", "measured at once"])
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_gradient, "_MEASURED_IDS", request.param)


def make(dtype: torch.dtype = torch.float64) -> tuple[TableGradient, Tensor]:
    """A head, and two lookups of repeated ids; and the whole."""
    torch.manual_seed(0)
    gradient = TableGradient(torch.empty(HEIGHT, WIDTH, dtype=dtype))
    logits_grad, states = torch.randn(HEIGHT, 3).to(dtype), torch.randn(3, WIDTH).to(dtype)
    gradient.add_product(logits_grad, states)
    whole = logits_grad.double() @ states.double()
    for ids in ([22, 0, 22, 7], [7, 3]):
        rows = torch.randn(len(ids), WIDTH).to(dtype)
        gradient.add_rows(torch.tensor(ids), rows)
        whole.index_add_(0, torch.tensor(ids), rows.double())
    return gradient, whole


def gather(gradient: TableGradient, height: int) -> Tensor:
    whole = torch.full((HEIGHT, WIDTH), torch.nan, dtype=torch.float64)
    for start, block in gradient.blocks(height):
        assert len(block) == min(height, HEIGHT - start)
        whole[start : start + len(block)] = block
    return whole


@pytest.mark.parametrize("height", [1, 4, HEIGHT, 100])
def test_blocks_are_the_whole_gradient(height: int):
    gradient, whole = make()
    torch.testing.assert_close(gather(gradient, height), whole)
    assert torch.equal(gather(gradient, height), gather(gradient, height))


def test_rows_alone_are_a_gradient_too(measured: None):
    gradient = TableGradient(torch.empty(HEIGHT, WIDTH, dtype=torch.float64))
    gradient.add_rows(torch.tensor([9, 1, 9]), torch.ones(3, WIDTH, dtype=torch.float64))
    whole = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    whole[9], whole[1] = 2.0, 1.0
    assert torch.equal(gather(gradient, 4), whole)
    torch.testing.assert_close(gradient.norm(), whole.norm())


def test_the_norm_is_that_of_the_whole(measured: None):
    gradient, whole = make()
    torch.testing.assert_close(gradient.norm(), whole.norm())


def test_the_norm_of_what_cancels_is_nothing(measured: None):
    """Its square is a difference of two numbers: their rounding is left, 1e-16 of each."""
    gradient = TableGradient(torch.empty(HEIGHT, WIDTH, dtype=torch.float64))
    logits_grad, states = torch.randn(HEIGHT, 2).double(), torch.randn(2, WIDTH).double()
    gradient.add_product(logits_grad, states)
    gradient.add_rows(torch.arange(HEIGHT), -(logits_grad @ states))
    assert gradient.norm() < 1e-7 * (logits_grad @ states).norm()


def test_bf16_factors_make_the_gradient_that_autocast_makes(measured: None):
    gradient, whole = make(torch.float32)
    low = TableGradient(torch.empty(HEIGHT, WIDTH))
    assert gradient._factors is not None
    logits_grad, states = (factor.bfloat16() for factor in gradient._factors)
    low.add_product(logits_grad, states)
    low.add_rows(gradient._ids, gradient._rows)
    product = (logits_grad @ states).float()
    rows = torch.zeros(HEIGHT, WIDTH).index_add_(0, gradient._ids, gradient._rows)
    torch.testing.assert_close(gather(low, 4).float(), product + rows)
    # A bf16 number is within 2**-9 of what it stands for.
    torch.testing.assert_close(low.norm().double(), whole.norm(), rtol=2**-8, atol=0)


def test_the_norm_of_large_fp16_factors_does_not_overflow(measured: None):
    gradient = TableGradient(torch.empty(HEIGHT, WIDTH))
    logits_grad = torch.full((HEIGHT, 3), 1000.0, dtype=torch.float16)
    states = torch.ones(3, WIDTH, dtype=torch.float16)
    gradient.add_product(logits_grad, states)
    whole = logits_grad.double() @ states.double()
    torch.testing.assert_close(gradient.norm().double(), whole.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_show_in_the_norm(measured: None, bad: float):
    gradient, _ = make()
    assert gradient._factors is not None
    gradient._factors[0][12, 2] = bad
    assert not gradient.norm().isfinite()


def test_one_product_of_a_quarter_of_the_width_is_taken():
    gradient, _ = make(torch.float32)
    assert not gradient.takes(1)
    gradient.clear()
    assert gradient.is_empty
    assert gradient.takes(WIDTH // 4)
    assert not gradient.takes(WIDTH // 4 + 1)


def test_a_second_product_is_an_error_and_not_lost():
    gradient, whole = make()
    with pytest.raises(RuntimeError, match="got a second one"):
        gradient.add_product(torch.ones(HEIGHT, 1), torch.ones(1, WIDTH))
    torch.testing.assert_close(gather(gradient, 4), whole)
