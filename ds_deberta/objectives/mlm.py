"""Masked language modeling: predict the masked tokens of a row.

B batch, L length, P predicted positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_deberta.data.loader import IGNORE_INDEX, Batch
from ds_deberta.kernels import HeadOutput
from ds_deberta.objectives import EXAMPLES, Engine, Metrics, loss_weights


class MLMObjective:
    """One model, one engine.

    Args:
        model: engine around a DebertaForMaskedLM.
        num_tokens: live ids of the vocabulary; the rows beyond are padding, never predicted.
            None: all rows are live.
    """

    def __init__(self, model: Engine, *, num_tokens: int | None = None) -> None:
        self.model = model
        self.num_tokens = num_tokens
        self.engines = {"model": model}

    def train_step(self, micro_batches: Sequence[Batch]) -> Metrics:
        """Update the model once on all micro-batches."""
        predicted = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in micro_batches])
        (weight,) = loss_weights(predicted.sum())
        losses, correct = [], []
        for batch in micro_batches:
            output = self._run(batch)
            self.model.backward(output.loss * weight)
            self.model.step()
            losses.append(output.loss.detach())
            correct.append((output.predictions == batch.labels).sum())
        return Metrics(
            means={
                "mlm_loss": (torch.stack(losses).sum(), predicted.sum()),
                "mlm_accuracy": (torch.stack(correct).sum(), predicted.sum()),
            },
            tokens=torch.stack([batch.attention_mask.sum() for batch in micro_batches]).sum(),
        )

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Metrics:
        """Loss and accuracy of one batch."""
        output = self._run(batch)
        count = (batch.labels != IGNORE_INDEX).sum()
        return Metrics(
            means={
                "mlm_loss": (output.loss, count),
                "mlm_accuracy": ((output.predictions == batch.labels).sum(), count),
            },
            tokens=batch.attention_mask.sum(),
            examples={
                "original": batch.original_ids()[:EXAMPLES],
                "masked": batch.input_ids[:EXAMPLES],
                "predicted": fill_in(batch, output.predictions)[:EXAMPLES],
            },
        )

    def _run(self, batch: Batch) -> HeadOutput:
        return self.model(
            batch.input_ids,
            batch.documents,
            batch.predicted_positions,
            batch.labels,
            num_tokens=self.num_tokens,
        )


def fill_in(batch: Batch, tokens: Tensor) -> Tensor:
    """Put tokens at a batch's predicted positions.

    Args:
        batch: B rows.
        tokens: [B, P] ids; those of unused positions are ignored.

    Returns:
        [B, L] the batch's input ids with the tokens in place.
    """
    # Unused entries all point at position 0 ([CLS]) and write back what stands there.
    current = batch.input_ids.gather(1, batch.predicted_positions)
    tokens = torch.where(batch.labels != IGNORE_INDEX, tokens, current)
    return batch.input_ids.scatter(1, batch.predicted_positions, tokens)
