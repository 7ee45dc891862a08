"""How frequent tokens are: what a model that ignores the context can reach.

A model whose held-out loss is not below that has not begun to learn, or has stopped to use its
attention. Without torch, for the data tools.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ds_deberta.data.masking import NGramMasker
from ds_deberta.data.shards import ShardDataset
from ds_deberta.data.tokenizer import SpecialTokens

if TYPE_CHECKING:
    from ds_deberta.data.loader import Batch

SAMPLED_TOKENS = 2**21


class UnigramLevel(NamedTuple):
    """What a model that ignores the context reaches on the held-out text."""

    loss: float
    """Nats per predicted token."""
    accuracy: float


class Unigram:
    """Token frequencies, as a model.

    Args:
        counts: [num_tokens] how often each id occurs.
        special: ids that are never predicted.
    """

    def __init__(self, counts: np.ndarray, special: SpecialTokens) -> None:
        weights = counts + 1.0  # a token that the sample lacks may occur elsewhere
        weights[list(special.ids())] = 0.0
        self.shares = weights / weights.sum()
        self._special = special

    @classmethod
    def of(cls, dataset: ShardDataset, num_tokens: int, special: SpecialTokens) -> "Unigram":
        """Count the tokens of evenly spaced rows: all, or about `SAMPLED_TOKENS`."""
        counts = np.zeros(num_tokens, dtype=np.int64)
        if len(dataset):
            most = max(1, SAMPLED_TOKENS // max(1, len(dataset[0])))
            rows = np.linspace(0, len(dataset) - 1, min(len(dataset), most), dtype=int)
            ids = np.concatenate([dataset[row] for row in rows])
            counts += np.bincount(ids, minlength=num_tokens)
        return cls(counts, special)

    def cross_entropy(self, ids: np.ndarray) -> float:
        """Nats per token of a text, special tokens left out."""
        shares = self.shares[ids]
        return float(-np.log(shares[shares > 0]).mean())

    def score_batches(self, batches: "Iterable[Batch]", masker: NGramMasker) -> np.ndarray:
        """Predict all masked tokens of batches. Returns [3] losses, right ones, predictions."""
        totals = np.zeros(3)
        for batch in batches:
            labels = batch.labels.numpy()
            is_predicted = labels >= 0  # elsewhere IGNORE_INDEX
            visible = batch.input_ids.gather(1, batch.predicted_positions).numpy()[is_predicted]
            labels = labels[is_predicted]
            totals += [*self.score(visible, labels, masker), len(labels)]
        return totals

    def score(
        self, visible: np.ndarray, labels: np.ndarray, masker: NGramMasker
    ) -> tuple[float, int]:
        """Predict masked tokens by all that can be known without their context.

        A token in place of a mask was kept, or drawn at random among all ordinary ones: it is
        likely the right one.

        Args:
            visible: [P] ids that stand at the predicted positions.
            labels: [P] the original ids.
            masker: what masked them.

        Returns:
            The sum of the losses in nats, and how many predictions are right.
        """
        shares, is_seen = self.shares, visible != self._special.mask
        kept = np.zeros(len(visible))  # probability that the token that is seen was kept
        if is_seen.any():
            random_prob = 1 - masker.mask_token_prob - masker.keep_prob
            as_kept = masker.keep_prob * shares[visible[is_seen]]
            as_random = max(0.0, random_prob) / np.count_nonzero(shares)
            kept[is_seen] = as_kept / (as_kept + as_random)
        probabilities = kept * (visible == labels) + (1 - kept) * shares[labels]
        commonest = shares.argmax()
        is_likelier = kept + (1 - kept) * shares[visible] > (1 - kept) * shares[commonest]
        guesses = np.where(is_seen & is_likelier, visible, commonest)
        return float(-np.log(probabilities).sum()), int((guesses == labels).sum())
