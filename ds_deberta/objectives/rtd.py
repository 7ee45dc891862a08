"""Replaced token detection: a generator fills the masks, a discriminator finds what it wrote.

    masked row -> generator -> one sampled token per mask -> corrupted row
    corrupted row -> discriminator -> was this token replaced?

The two models share their token embeddings (`embedding_sharing`):

- gdes: `E_D = stop_grad(E_G) + E_delta`. The rows of E_G reach the discriminator as a tensor
  without gradient, so the discriminator never pulls at the generator's table.
- es: `E_D = E_G`. The table belongs to the generator's engine; the discriminator's gradient at
  the looked-up rows is handed over as the surrogate loss `(lookup(E_G, ids) * gradient).sum()`.
- nes: two independent tables.

B batch, L length, P predicted positions, E embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.data.loader import IGNORE_INDEX, Batch
from ds_deberta.kernels import HeadOutput
from ds_deberta.objectives import EXAMPLES, Engine, Metrics, loss_weights
from ds_deberta.objectives.mlm import fill_in

EmbeddingSharing = Literal["gdes", "es", "nes"]


@dataclass(frozen=True)
class Corrupted:
    """What the generator made of a batch."""

    input_ids: Tensor  # [B, L] the row the discriminator reads
    documents: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    replaced: Tensor  # [B, L] True where the token differs from the original
    soundness: Tensor  # 0-d: 0, or NaN where the samples came from logits that are not finite
    metrics: dict[str, tuple[Tensor, Tensor]]


class RTDObjective:
    """Generator and discriminator, one engine each.

    Args:
        generator: engine around a DebertaForMaskedLM.
        discriminator: engine around a DebertaForRTD with the same `embedding_sharing`.
        embedding_sharing: "gdes", "es" or "nes".
        num_tokens: live ids of the vocabulary; the rows beyond are padding, never sampled
            nor predicted.
        rtd_lambda: weight of the discriminator's loss. With an engine of its own it matters
            only through gradient clipping (and, for "es", in the shared table).
        temperature: of the generator's samples.
    """

    def __init__(
        self,
        generator: Engine,
        discriminator: Engine,
        *,
        embedding_sharing: EmbeddingSharing,
        num_tokens: int,
        rtd_lambda: float,
        temperature: float = 1.0,
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.engines = {"generator": generator, "discriminator": discriminator}
        self.embedding_sharing = embedding_sharing
        self.num_tokens = num_tokens
        self.rtd_lambda = rtd_lambda
        self.temperature = temperature

    def train_step(self, micro_batches: Sequence[Batch]) -> Metrics:
        """Update the generator on all micro-batches, then the discriminator on what it wrote.

        As the original: samples come from the logits before the generator's update, the shared
        embeddings are the updated ones. Where the generator's loss is not finite, its samples mean
        nothing, and neither model is updated.
        """
        predicted = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in micro_batches])
        tokens = torch.stack([batch.attention_mask.sum() for batch in micro_batches])
        generator_weight, discriminator_weight = loss_weights(predicted.sum(), tokens.sum())
        discriminator_weight = discriminator_weight * self.rtd_lambda
        if self.embedding_sharing == "es":
            steps = [
                self._shared_step(batch, generator_weight, discriminator_weight)
                for batch in micro_batches
            ]
        else:
            corrupted = [self._generator_step(batch, generator_weight) for batch in micro_batches]
            steps = [self._discriminator_step(each, discriminator_weight) for each in corrupted]
        return Metrics(means=_add(steps), tokens=tokens.sum(), scores=steps[-1].scores)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Metrics:
        """Both models on one batch; the samples depend on the row and the seed alone."""
        corrupted = self._corrupt(batch, self._generate(batch))
        base = self._shared_rows(corrupted)
        metrics = self._discriminator_metrics(corrupted, self._discriminator(corrupted, base))
        examples = {
            "original": batch.original_ids()[:EXAMPLES],
            "masked": batch.input_ids[:EXAMPLES],
            "corrupted": corrupted.input_ids[:EXAMPLES],
        }
        return replace(metrics, examples=examples)

    def _generator_step(self, batch: Batch, weight: Tensor) -> Corrupted:
        output = self._generate(batch)
        self.generator.backward(output.loss * weight)
        self.generator.step()
        return self._corrupt(batch, output)

    def _discriminator_step(self, corrupted: Corrupted, weight: Tensor) -> Metrics:
        with torch.no_grad():
            base = self._shared_rows(corrupted)
        logits = self._discriminator(corrupted, base)
        self.discriminator.backward(_rtd_loss(logits, corrupted) * weight + corrupted.soundness)
        self.discriminator.step()
        return self._discriminator_metrics(corrupted, logits.detach())

    def _shared_step(
        self, batch: Batch, generator_weight: Tensor, discriminator_weight: Tensor
    ) -> Metrics:
        """One micro-batch of "es": the discriminator first, so that its gradient can be shared."""
        output = self._generate(batch)
        corrupted = self._corrupt(batch, output)

        rows = self._shared_rows(corrupted)
        assert rows is not None
        leaf = rows.detach().requires_grad_()  # [B, L, E]
        rtd_logits = self._discriminator(corrupted, leaf)
        rtd_loss = _rtd_loss(rtd_logits, corrupted) * discriminator_weight + corrupted.soundness
        self.discriminator.backward(rtd_loss)
        self.discriminator.step()

        assert leaf.grad is not None
        surrogate = (rows.float() * leaf.grad.float()).sum()
        self.generator.backward(output.loss * generator_weight + surrogate)
        self.generator.step()
        return self._discriminator_metrics(corrupted, rtd_logits.detach())

    def _generate(self, batch: Batch) -> HeadOutput:
        return self.generator(
            batch.input_ids,
            batch.documents,
            batch.predicted_positions,
            batch.labels,
            batch.uniforms,
            num_tokens=self.num_tokens,
            temperature=self.temperature,
        )

    def _shared_rows(self, corrupted: Corrupted) -> Tensor | None:
        """The generator's embedding rows [B, L, E], or None where nothing is shared.

        A lookup, never the whole table; under ZeRO-3 the embedding's own hooks gather it.
        """
        if self.embedding_sharing == "nes":
            return None
        generator: Any = self.generator.module
        return generator.deberta.embeddings.lookup(corrupted.input_ids, corrupted.documents)

    def _discriminator(self, corrupted: Corrupted, base: Tensor | None) -> Tensor:
        return self.discriminator(corrupted.input_ids, corrupted.documents, base)  # [B, L]

    def _corrupt(self, batch: Batch, output: HeadOutput) -> Corrupted:
        assert output.samples is not None
        input_ids = fill_in(batch, output.samples)  # [B, L]
        count = (batch.labels != IGNORE_INDEX).sum()
        replaced = input_ids != batch.original_ids()  # [B, L]
        return Corrupted(
            input_ids=input_ids,
            documents=batch.documents,
            attention_mask=batch.attention_mask,
            replaced=replaced,
            soundness=output.loss.detach() * 0,
            metrics={
                "generator_loss": (output.loss.detach(), count),
                "mlm_accuracy": ((output.predictions == batch.labels).sum(), count),
                "replaced_per_mask": (replaced.sum(), count),
            },
        )

    def _discriminator_metrics(self, corrupted: Corrupted, logits: Tensor) -> Metrics:
        mask, replaced = corrupted.attention_mask, corrupted.replaced
        count = mask.sum()
        return Metrics(
            means=corrupted.metrics
            | {
                "discriminator_loss": (_rtd_loss(logits, corrupted), count),
                "rtd_accuracy": ((((logits > 0) == replaced) & mask).sum(), count),
                "replaced_fraction": (replaced.sum(), count),
            },
            tokens=count,
            scores=(logits, replaced, mask),
        )


def _rtd_loss(logits: Tensor, corrupted: Corrupted) -> Tensor:
    """Binary cross-entropy summed over real tokens, [CLS] and [SEP] included, in nats."""
    each = F.binary_cross_entropy_with_logits(
        logits.float(), corrupted.replaced.float(), reduction="none"
    )
    return (each * corrupted.attention_mask).sum()


def _add(steps: Sequence[Metrics]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (
            torch.stack([step.means[name][0].double() for step in steps]).sum(),
            torch.stack([step.means[name][1] for step in steps]).sum(),
        )
        for name in steps[0].means
    }
