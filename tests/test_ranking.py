"""AUC and average precision of binned scores equal the exact ones."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ds_deberta import ranking
from ds_deberta.ranking import Ranking
from tests.objectives.test_host_sync import NoReading, NoSync

PROMISED = 1e-3
TOKENS, BATCHES = 40_000, 8  # five times as many as the sample, in tests


def exact(scores: Tensor, replaced: Tensor) -> tuple[float, float]:
    """Both by their definitions, a threshold at each distinct score."""
    values, group = scores.unique(return_inverse=True)
    count = [
        torch.zeros(len(values)).double().index_add(0, group, (replaced == c).double()).flip(0)
        for c in (True, False)
    ]
    hits, misses = (each.cumsum(0) for each in count)
    auc = (hits[-1] * misses[-1] - (misses - count[1] / 2) @ count[0]) / (hits[-1] * misses[-1])
    return auc.item(), (hits / (hits + misses) @ count[0] / hits[-1]).item()


def normal() -> Tensor:
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(0))


def ties() -> Tensor:
    """Half of all scores are one; the others lie close around it."""
    x = normal()
    return torch.where(torch.arange(TOKENS) % 2 == 0, 0.3, 0.3 + x * 1e-5)


DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "as in a training": lambda: normal() * 2 - 3,
    "all in a tiny range": lambda: -2.5 + normal() * 1e-5,
    "around zero": lambda: normal() * 1e-30,
    "heavy ties": ties,
    "few values": lambda: normal().round(),
    "one value": lambda: torch.full((TOKENS,), -2.0),
    "extreme": lambda: normal().sign() * (normal().abs() * 18).exp(),
    "two far clusters": lambda: torch.where(normal() > 1, 1e4 + normal(), -1e4 + normal()),
    "later ones unlike the first": lambda: normal() + torch.arange(TOKENS) * 1e-4,
    "in bfloat16": lambda: normal().bfloat16(),
}


@pytest.mark.parametrize("separation", [0.0, 1.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_binned_values_are_within_a_thousandth(monkeypatch, name, separation):
    monkeypatch.setattr(ranking, "SAMPLE", TOKENS // 5)
    scores = DISTRIBUTIONS[name]()
    ranks = scores.double().argsort().argsort() / TOKENS
    chance = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    replaced = chance < 0.1 * (1 - separation) + 0.2 * separation * ranks**3
    found = Ranking()
    everywhere = torch.ones(TOKENS // BATCHES, dtype=torch.bool)
    for part, label in zip(scores.chunk(BATCHES), replaced.chunk(BATCHES), strict=True):
        found.add((part[None], label[None], everywhere[None]))
    assert found.quality() == pytest.approx(exact(scores, replaced), abs=PROMISED)


def test_few_scores_are_ranked_exactly():
    scores = normal()[:5000] * 1e-6 + 7
    replaced = torch.rand(5000, generator=torch.Generator().manual_seed(1)) < 0.15
    found = Ranking()
    found.add((scores, replaced, torch.ones_like(replaced)))
    assert found.quality() == pytest.approx(exact(scores, replaced), abs=1e-12)


def test_what_is_kept_does_not_grow_with_the_tokens(monkeypatch):
    """And no batch waits for the device."""
    monkeypatch.setattr(ranking, "SAMPLE", 1000)
    found, sizes = Ranking(), []
    for _ in range(4):
        scores = normal(), normal() > 0, normal() > -1
        with NoReading(), NoSync():
            found.add(scores)
        sizes.append(sum(x.nbytes for x in vars(found).values() if isinstance(x, Tensor)))
        assert not found._kept
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_give_nan_unless_they_are_padding(bad):
    scores, replaced = torch.tensor([0.5, bad, 1.5]), torch.tensor([False, True, True])
    everywhere, without = torch.tensor([True] * 3), torch.tensor([True, False, True])
    for mask, expected in ((everywhere, math.nan), (without, 1.0)):
        found = Ranking()
        found.add((scores, replaced, mask))
        assert found.quality() == pytest.approx((expected, expected), nan_ok=True)


@pytest.mark.parametrize("replaced", [True, False])
def test_nothing_to_tell_apart_gives_nan(replaced):
    found = Ranking()
    assert all(math.isnan(value) for value in found.quality())
    found.add((torch.rand(5), torch.full((5,), replaced), torch.ones(5, dtype=torch.bool)))
    assert all(math.isnan(value) for value in found.quality())


def test_ranks_add_up_to_what_one_process_finds(monkeypatch):
    """Of unlike scores, the last ones on one rank only. Two threads stand for two ranks."""
    barrier, given = threading.Barrier(2), {}

    def everyone(tensor: Tensor) -> list[Tensor]:
        given[threading.current_thread().name] = tensor
        barrier.wait(30)
        tensors = [given["0"], given["1"]]
        barrier.wait(30)
        return tensors

    monkeypatch.setattr(ranking, "SAMPLE", 4000)
    monkeypatch.setattr(ranking, "world_size", lambda: 2)
    monkeypatch.setattr(ranking, "gather_across_ranks", lambda x: torch.cat(everyone(x)))
    monkeypatch.setattr(ranking, "sum_across_ranks", lambda x: sum(everyone(x)))
    scores = normal() * torch.linspace(1, 3, TOKENS)
    replaced = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < scores.sigmoid() / 3
    qualities = []

    def run_rank(rank: int) -> None:
        found = Ranking()
        for part, label in zip(
            scores[rank::2].split(5000), replaced[rank::2].split(5000), strict=True
        ):
            found.add((part, label, torch.ones_like(label)))
        found.add((torch.full((9,), 50.0), torch.arange(9) > 3, torch.full((9,), rank == 0)))
        qualities.append(found.quality())

    threads = [threading.Thread(target=run_rank, args=(r,), name=str(r)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    scores = torch.cat([scores, torch.full((9,), 50.0)])
    expected = exact(scores, torch.cat([replaced, torch.arange(9) > 3]))
    assert qualities == [pytest.approx(expected, abs=PROMISED)] * 2
