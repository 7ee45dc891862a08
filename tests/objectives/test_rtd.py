"""The objectives on plain torch engines: no DeepSpeed, no processes."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_deberta.data import DebertaTokenizer
from ds_deberta.data.loader import IGNORE_INDEX, Batch
from ds_deberta.kernels import HeadOutput
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from tests.cases import build_models
from tests.plain import draw


class TorchEngine:
    """What an objective needs of an engine, with plain SGD; updates every `accumulation` calls."""

    def __init__(self, module: nn.Module, *, lr: float = 0.1, accumulation: int = 1) -> None:
        self.module = module
        self.optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        self.accumulation = accumulation
        self.calls: list[str] = []

    def __call__(self, *args, **kwargs) -> Any:
        self.calls.append("forward")
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.calls.append("backward")
        loss.backward()

    def step(self) -> None:
        self.calls.append("step")
        if self.calls.count("step") % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def stats(self) -> dict[str, float]:
        return {}

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def random_batch(tokenizer: DebertaTokenizer, rows: int, length: int = 32, seed: int = 0) -> Batch:
    """Rows of different lengths, 5 masks each but the last, which has 2."""
    g = torch.Generator().manual_seed(seed)
    original = torch.randint(4, tokenizer.num_tokens - 1, (rows, length), generator=g)
    mask = torch.arange(length) < torch.randint(20, length + 1, (rows, 1), generator=g)
    original = original.masked_fill(~mask, 0)
    original[:, 0] = tokenizer.special.cls
    positions = (torch.randperm(18, generator=g)[:5].sort().values + 1).expand(rows, 5).clone()
    labels = original.gather(1, positions)
    labels[-1, 2:] = IGNORE_INDEX
    positions[-1, 2:] = 0
    masked = torch.where(labels == IGNORE_INDEX, tokenizer.special.cls, tokenizer.special.mask)
    return Batch(
        input_ids=original.scatter(1, positions, masked),
        documents=mask,
        predicted_positions=positions,
        labels=labels,
        uniforms=torch.rand(rows, 5, generator=g, dtype=torch.float64),
        sample_numbers=torch.arange(rows),
    )


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(getattr(batch, field.name)[start:stop] for field in fields(batch)))


def rtd(tokenizer: DebertaTokenizer, sharing: str, engine: Any = TorchEngine) -> RTDObjective:
    models = build_models("rtd", sharing, tokenizer)
    engines = {name: engine(model) for name, model in models.items()}
    return RTDObjective(
        engines["generator"],
        engines["discriminator"],
        embedding_sharing=sharing,  # type: ignore[arg-type]
        num_tokens=tokenizer.num_tokens,
        rtd_lambda=10.0,
    )


@pytest.mark.parametrize("sharing", ["gdes", "es", "nes", "mlm"])
def test_micro_batches_of_any_cut_give_the_update_of_the_whole_batch(tokenizer, sharing):
    """Rows hold different numbers of tokens and masks, so a mean of means would differ."""
    batch = random_batch(tokenizer, rows=7)

    def trained(cuts: list[int]) -> dict[str, Tensor]:
        edges = list(zip([0, *cuts], [*cuts, 7], strict=True))
        micro_batches = [rows_of(batch, a, b) for a, b in edges]
        if sharing == "mlm":
            model = build_models("mlm", "nes", tokenizer)["model"]
            MLMObjective(TorchEngine(model, accumulation=len(edges))).train_step(micro_batches)
            return model.state_dict()
        objective = rtd(tokenizer, sharing, partial(TorchEngine, accumulation=len(edges)))
        objective.train_step(micro_batches)
        return {
            f"{name}.{key}": value
            for name, engine in objective.engines.items()
            for key, value in engine.module.state_dict().items()
        }

    whole = trained([])
    fresh = build_models("mlm" if sharing == "mlm" else "rtd", sharing, tokenizer)
    first = next(iter(fresh.values())).state_dict()
    prefix = "" if sharing == "mlm" else "generator."
    moved = max((whole[prefix + key] - first[key]).abs().max() for key in first)
    assert moved > 1e-3  # it did train
    for cuts in ([1], [2, 3], [1, 2, 3, 4, 5, 6]):
        torch.testing.assert_close(trained(cuts), whole, rtol=1e-4, atol=2e-7)


def test_the_generator_steps_first_and_the_discriminator_reads_its_updated_table(tokenizer):
    objective = rtd(tokenizer, "gdes")
    batch = random_batch(tokenizer, rows=3)
    generator, discriminator = objective.generator, objective.discriminator
    before = generator.module.deberta.embeddings.word_embeddings.weight.detach().clone()
    seen: list[Tensor] = []
    inner = discriminator.module.forward
    discriminator.module.forward = lambda ids, mask, base: (
        seen.extend([ids, base]) or inner(ids, mask, base)
    )
    objective.train_step([batch])
    after = generator.module.deberta.embeddings.word_embeddings.weight.detach()
    ids, base = seen
    assert not torch.equal(before, after)
    assert torch.equal(base, after[ids])
    assert not base.requires_grad


@pytest.mark.parametrize("sharing", ["gdes", "nes"])
def test_the_discriminator_leaves_the_generator_alone(tokenizer, sharing):
    batch = random_batch(tokenizer, rows=3)
    objective = rtd(tokenizer, sharing)
    objective.discriminator.optimizer.param_groups[0]["lr"] = 100.0  # whatever it does
    objective.train_step([batch])
    alone = build_models("rtd", sharing, tokenizer)["generator"]
    MLMObjective(TorchEngine(alone)).train_step([batch])
    torch.testing.assert_close(
        objective.generator.module.state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-8
    )


def test_es_gives_the_table_both_gradients(tokenizer):
    """Against one graph over both models."""
    batch = random_batch(tokenizer, rows=3)
    objective = rtd(tokenizer, "es")
    table = objective.generator.module.deberta.embeddings.word_embeddings.weight
    start = table.detach().clone()
    objective.train_step([batch])
    got = (start - table.detach()) / 0.1

    models = build_models("rtd", "es", tokenizer)
    generator, discriminator = models["generator"], models["discriminator"]
    logits = generator.logits(batch.input_ids, batch.attention_mask, batch.predicted_positions)
    used = batch.labels != IGNORE_INDEX
    loss = nn.functional.cross_entropy(logits[used], batch.labels[used])
    ids = draw(logits, batch, tokenizer.num_tokens)
    rows = generator.deberta.embeddings.word_embeddings(ids)
    found = discriminator(ids, batch.attention_mask, rows)[batch.attention_mask]
    truth = (ids != batch.original_ids())[batch.attention_mask].float()
    loss = loss + 10.0 * nn.functional.binary_cross_entropy_with_logits(found, truth)
    loss.backward()
    expected = generator.deberta.embeddings.word_embeddings.weight.grad
    # An update of lr 0.1 in fp32 returns the gradient to within 2^-24 x |weight| / 0.1.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_padding_rows_of_the_vocabulary_are_never_sampled_nor_predicted(tokenizer):
    objective = rtd(tokenizer, "nes")
    head = objective.generator.module.lm_predictions["lm_head"]
    with torch.no_grad():
        head.bias[tokenizer.num_tokens :] = 100.0
    batch = random_batch(tokenizer, rows=8)
    with torch.no_grad():
        output = objective._generate(batch)
        assert output.predictions.max() < tokenizer.num_tokens
        corrupted = objective._corrupt(batch, output)
    assert corrupted.input_ids.max() < tokenizer.num_tokens
    mlm = MLMObjective(objective.generator, num_tokens=tokenizer.num_tokens)
    assert mlm.eval_step(batch).examples["predicted"].max() < tokenizer.num_tokens


def test_a_sample_that_is_right_is_not_replaced(tokenizer):
    objective = rtd(tokenizer, "nes")
    batch = random_batch(tokenizer, rows=4)
    right = batch.labels.clamp(min=0)
    corrupted = objective._corrupt(batch, HeadOutput(torch.zeros(()), right, right))
    assert not corrupted.replaced.any()
    assert torch.equal(corrupted.input_ids, batch.original_ids())


def test_evaluation_counts_empty_rows_as_nothing(tokenizer):
    objective = rtd(tokenizer, "gdes")
    batch = random_batch(tokenizer, rows=3)
    empty = Batch(
        input_ids=torch.zeros(2, 32, dtype=torch.int64),
        documents=torch.zeros(2, 32, dtype=torch.bool),
        predicted_positions=torch.zeros(2, 5, dtype=torch.int64),
        labels=torch.full((2, 5), IGNORE_INDEX),
        uniforms=torch.zeros(2, 5, dtype=torch.float64),
        sample_numbers=torch.full((2,), -1),
    )
    filled = Batch(
        *(torch.cat([getattr(batch, f.name), getattr(empty, f.name)]) for f in fields(batch))
    )
    expected, got = objective.eval_step(batch), objective.eval_step(filled)
    for name, (total, count) in expected.means.items():
        assert torch.equal(got.means[name][1], count)
        torch.testing.assert_close(got.means[name][0], total, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(objective.eval_step(empty).means["discriminator_loss"][0])
