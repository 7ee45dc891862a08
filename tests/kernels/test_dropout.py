"""Dropout on the CPU: its distribution, its gradient, and what it draws from."""

import math

import pytest
import torch

from ds_deberta.kernels import Dropout, dropout
from ds_deberta.kernels.dropout import keep, keep_mask

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
draw = torch.ops.ds_deberta.dropout_mask.default


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_elements_are_dropped_at_the_rate_and_the_mean_stays(p: float) -> None:
    torch.manual_seed(0)
    count = 400_001
    dropped = dropout(torch.ones(count), p)
    kept = dropped != 0
    spread = math.sqrt(p * (1 - p) / count)
    assert abs(kept.double().mean() - (1 - p)) < 5 * spread
    torch.testing.assert_close(
        dropped[kept], torch.full_like(dropped[kept], 1 / (1 - p)), rtol=2e-4, atol=0
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.997])
def test_elements_of_one_draw_are_independent(p: float) -> None:
    torch.manual_seed(0)
    draws = (dropout(torch.ones(100_000, 4), p) != 0).double()  # a draw of 64 bits per row
    correlations = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], 1).T)
    apart = correlations[~torch.eye(8, dtype=torch.bool)]
    assert apart.abs().max() < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_the_value_did(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.ones(7, 31, dtype=dtype, requires_grad=True)
    dropped = dropout(values, 0.3)
    dropped.sum().backward()
    assert dropped.dtype == dtype
    assert torch.equal(values.grad, dropped.detach())


def test_nothing_and_everything_can_be_dropped() -> None:
    values = torch.randn(5)
    assert torch.equal(dropout(values, 0.0), values)
    assert torch.equal(dropout(values, 1.0), torch.zeros(5))


def test_it_draws_from_torchs_generator_and_only_in_training() -> None:
    layer = Dropout(0.5)
    values = torch.ones(64)
    torch.manual_seed(3)
    first = layer(values)
    torch.manual_seed(3)
    assert torch.equal(first, layer(values))
    assert not torch.equal(first, layer(values))
    assert layer.eval()(values) is values


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mask_keeps_what_a_product_with_it_keeps(dtype: torch.dtype) -> None:
    values = torch.randn(3, 50).to(dtype)
    mask, _ = keep_mask(values.shape, 0.4)
    assert 0 < mask.sum() < mask.numel()
    kept = keep(values, mask)
    assert kept.dtype == dtype
    assert torch.equal(kept, values * mask)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7)])
def test_any_shape_has_a_mask(shape: tuple[int, ...]) -> None:
    assert keep_mask(torch.Size(shape), 0.1)[0].shape == shape


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_seed_gives_one_mask_in_every_dtype(dtype: torch.dtype) -> None:
    whole = draw(torch.tensor([7]), [3, 50], 6554, 1.0, torch.int16)
    mask = draw(torch.tensor([7]), [3, 50], 6554, 1.25, dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, whole * torch.tensor(1.25, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int16, *FLOATS])
def test_the_operator_is_what_a_compiler_takes_it_for(dtype: torch.dtype) -> None:
    torch.library.opcheck(draw, (torch.tensor([7]), [3, 5], 6554, 1.0, dtype))
    masks = [draw(torch.tensor([seed]), [3, 50], 6554, 1.0, dtype) for seed in (7, 7, 8)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
