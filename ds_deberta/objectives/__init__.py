"""What is trained: masked language modeling, or replaced token detection.

An objective turns the micro-batches of one optimizer step into exactly one update of its
models. It sees an engine only through the protocol below, so this package reads, imports and
tests without DeepSpeed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_deberta.data.loader import Batch
from ds_deberta.distributed import sum_across_ranks, world_size
from ds_deberta.model_state import ModelState


class Engine(Protocol):
    """A model with its optimizer, as everything but engine.py sees it."""

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; they are averaged over ranks, summed over calls.

        A loss that is not finite must make gradients that are not finite.
        """
        ...

    def step(self) -> None:
        """End a micro-batch; the last one of an optimizer step updates the weights."""
        ...

    @property
    def applied(self) -> bool:
        """False if the last update was skipped, on all ranks, for its gradients are not finite."""
        ...

    def stats(self) -> dict[str, float]:
        """learning_rate, grad_norm (before clipping) and the like, of the last update. Syncs."""
        ...

    def follow_schedule(self) -> None:
        """Set the learning rate of the next update again; the schedule has changed."""
        ...

    def state(self) -> ModelState:
        """Weights, optimizer and schedule, for a checkpoint."""
        ...

    def restore(self, state: ModelState) -> None:
        """Go on from such a state. Every rank must call it."""
        ...


EXAMPLES = 3
"""Rows of an evaluation batch that are shown as text."""


@dataclass(frozen=True)
class Metrics:
    """What one step, or one evaluation batch, measured on this rank. Nothing leaves the device."""

    means: dict[str, tuple[Tensor, Tensor]]
    """name -> (sum, count), both 0-d: means over any number of steps and ranks stay exact."""
    tokens: Tensor
    """Real tokens read, 0-d."""
    scores: tuple[Tensor, Tensor, Tensor] | None = None
    """[B, L] the discriminator's logits, whether the token was replaced, and the attention mask."""
    examples: dict[str, Tensor] = field(default_factory=dict)
    """The first rows as the models saw them: name -> [rows, L] token ids."""


class Objective(Protocol):
    """One optimizer step, and one evaluation batch."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Its engines by name; the names are also the checkpoint's folders."""
        ...

    def train_step(self, micro_batches: Sequence[Batch]) -> Metrics:
        """Make exactly one optimizer step of every engine."""
        ...

    def eval_step(self, batch: Batch) -> Metrics:
        """Measure one batch, without gradient."""
        ...


def loss_weights(*counts: Tensor) -> list[Tensor]:
    """Weights that turn sums over this rank's tokens into means over the whole step's tokens.

    Engines average gradients over ranks and add them over micro-batches. With these weights the
    result is the mean over every token of the global batch, however it was cut into ranks and
    micro-batches; the original's mean of means depends on that cut.

    Args:
        counts: tokens of this rank in this step, 0-d each.

    Returns:
        For each count, world_size / (the count's sum over ranks), 0-d.
    """
    totals = sum_across_ranks(torch.stack(list(counts)))
    return list(world_size() / totals.clamp(min=1))
