"""The table's one gradient is the sum of the lookup's and the head's."""

import pytest
import torch
import torch.nn.functional as F

from ds_deberta.kernels import TableGradient, tied_lookup


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradient_is_that_of_two_uses(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 1], [8, 2, 0]])
    rows_weight, table_weight = torch.randn(2, 3, 4).double(), torch.randn(9, 4).double()

    def gradient(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        loss = (rows * rows_weight).sum() + (table.square() * table_weight).sum()
        return torch.autograd.grad(loss, weight)[0]

    expected = gradient(F.embedding(ids, weight, padding_idx), weight)
    torch.testing.assert_close(gradient(*tied_lookup(weight, ids, padding_idx)), expected)
    (alone,) = torch.autograd.grad(tied_lookup(weight, ids, padding_idx)[0].sum(), weight)
    (truth,) = torch.autograd.grad(F.embedding(ids, weight, padding_idx).sum(), weight)
    torch.testing.assert_close(alone, truth)


def test_rows_go_where_the_head_s_gradient_went() -> None:
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    gradient = TableGradient(weight)
    ids = torch.tensor([[1, 2, 1], [8, 2, 0]])
    rows, _ = tied_lookup(weight, ids, 2, gradient)  # the head gives back nothing
    rows.square().sum().backward()
    assert weight.grad is None
    (truth,) = torch.autograd.grad(F.embedding(ids, weight, 2).square().sum(), weight)
    _, whole = next(gradient.blocks(9))
    torch.testing.assert_close(whole, truth)
