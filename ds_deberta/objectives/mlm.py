"""Masked language modeling: predict the masked tokens of a row.

B batch, L length, P predicted positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.data import IGNORE_INDEX, Batch
from ds_deberta.objectives import EXAMPLES, Engine, Metrics, loss_weights


class MLMObjective:
    """One model, one engine."""

    def __init__(self, model: Engine) -> None:
        self.model = model
        self.engines = {"model": model}

    def train_step(self, micro_batches: Sequence[Batch]) -> Metrics:
        """Update the model once on all micro-batches."""
        predicted = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in micro_batches])
        (weight,) = loss_weights(predicted.sum())
        losses, correct = [], []
        for batch in micro_batches:
            logits = self.model(batch.input_ids, batch.attention_mask, batch.predicted_positions)
            loss = mlm_loss(logits, batch.labels)
            self.model.backward(loss * weight)
            self.model.step()
            losses.append(loss.detach())
            correct.append((logits.detach().argmax(-1) == batch.labels).sum())
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
        logits = self.model(batch.input_ids, batch.attention_mask, batch.predicted_positions)
        count = (batch.labels != IGNORE_INDEX).sum()
        predictions = logits.argmax(-1)  # [B, P]
        return Metrics(
            means={
                "mlm_loss": (mlm_loss(logits, batch.labels), count),
                "mlm_accuracy": ((predictions == batch.labels).sum(), count),
            },
            tokens=batch.attention_mask.sum(),
            examples={
                "original": batch.original_ids()[:EXAMPLES],
                "masked": batch.input_ids[:EXAMPLES],
                "predicted": fill_in(batch, predictions)[:EXAMPLES],
            },
        )


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the predicted positions, in fp32, in nats.

    Args:
        logits: [B, P, V].
        labels: [B, P] original ids, IGNORE_INDEX where unused.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
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
