"""Choose the tokens to predict and hide them: unigrams, or n-grams of whole words.

The budget, the n-gram lengths and the mask/keep/random rule are the original's. Its left-to-right
sweep, which never reaches the end of a full row, is not: here every position is equally likely.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds_deberta.data.tokenizer import SpecialTokens

LONGEST_WORD = 8
"""Tokens of a word at most. A longer one, of text without spaces or a web address, is cut."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NGramMasker:
    """Mask rows of token ids; all randomness comes from the generator that is passed in."""

    special: SpecialTokens
    is_word_start: np.ndarray
    """bool [num_tokens]; pieces that start no word belong to the word before (max_ngram > 1)."""
    num_tokens: int
    """Live ids; random replacements are drawn among them, special tokens excepted."""
    max_seq_length: int
    mask_prob: float = 0.15
    """Share of a row's tokens to predict."""
    max_ngram: int = 1
    """1: single tokens. More: runs of 1 to max_ngram whole words, n of them with weight 1/n."""
    mask_token_prob: float = 0.8
    """A predicted token becomes [MASK] with this probability,"""
    keep_prob: float = 0.1
    """stays as it is with this one, and else becomes a random token."""

    def __post_init__(self):
        if not 0 < self.mask_prob <= 1:
            raise ValueError(f"mask_prob must be in (0, 1]; got {self.mask_prob}")
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1; got {self.max_ngram}")
        # 1e-9: 0.8 + 0.2 may be a rounding error above 1.
        if min(self.mask_token_prob, self.keep_prob) < 0 or (
            self.mask_token_prob + self.keep_prob > 1 + 1e-9
        ):
            raise ValueError(
                "mask_token_prob and keep_prob must not be negative, nor more than 1 together; "
                f"got {self.mask_token_prob} and {self.keep_prob}"
            )
        assert len(self.is_word_start) == self.num_tokens

    @property
    def max_predictions(self) -> int:
        """Capacity of predicted positions per row, never exceeded (80 for 512 at 15 %)."""
        return math.ceil(self.max_seq_length * self.mask_prob / 10) * 10

    def __call__(
        self, ids: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mask one row.

        Args:
            ids: [n] with [CLS] and [SEP]; one or more documents, which each start with [CLS].
            rng: The same generator state gives the same mask.

        Returns:
            The masked ids [n], the predicted positions [k] ascending, and their original ids [k];
            k is 0 only if the row has nothing but special tokens.
        """
        candidates = np.flatnonzero(self._is_maskable[ids])
        budget = min(self.max_predictions, max(1, round(len(ids) * self.mask_prob)))
        if self.max_ngram == 1 or len(candidates) == 0:
            budget = min(budget, len(candidates))
            positions = rng.choice(candidates, budget, replace=False, shuffle=False)
        else:
            positions = self._choose_ngrams(ids, candidates, budget, rng)
        positions.sort()
        labels = ids[positions]

        masked = ids.copy()
        u = rng.random(len(positions))
        masked[positions[u < self.mask_token_prob]] = self.special.mask
        replaced = positions[u >= self.mask_token_prob + self.keep_prob]
        if len(replaced):
            masked[replaced] = rng.choice(self._ordinary_ids, len(replaced))
        return masked, positions, labels

    def _choose_ngrams(
        self, ids: np.ndarray, candidates: np.ndarray, budget: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Take whole words, in runs, until the budget is reached; return their positions.

        The row's words are cut into consecutive runs, which are visited in random order. The cut
        starts at a random word and goes around the end, so that no position is special. Neither
        words nor runs reach from one document into another.
        """
        document = (ids == self.special.cls).cumsum()[candidates]
        starts = self.is_word_start[ids[candidates]]
        starts |= _differs(document)
        starts |= _cuts_of_long_words(starts, rng)
        first = np.flatnonzero(starts)  # index of each word's first token in `candidates`
        size = np.diff(first, append=len(candidates))
        num_words = len(first)

        lengths = 1 + np.searchsorted(self._ngram_cdf, rng.random(num_words), side="right")
        chance = rng.random(num_words)
        cut = (np.arange(num_words) + rng.integers(num_words)) % num_words
        run = np.repeat(np.arange(num_words), lengths)[:num_words]
        run = (_differs(run) | _differs(document[first[cut]])).cumsum() - 1
        words = cut[np.argsort(chance[run], kind="stable")]

        # The word that reaches the budget is the last, and taken whole if the capacity allows.
        num_taken = np.cumsum(size[words])
        words = words[: 1 + np.searchsorted(num_taken, budget)]
        size = size[words]
        begin = num_taken[: len(words)] - size
        tokens = np.repeat(first[words] - begin, size) + np.arange(size.sum())
        return candidates[tokens[: self.max_predictions]]

    @cached_property
    def _is_maskable(self) -> np.ndarray:
        maskable = np.ones(self.num_tokens, dtype=bool)
        maskable[list(self.special.ids())] = False
        return maskable

    @cached_property
    def _ordinary_ids(self) -> np.ndarray:
        return np.flatnonzero(self._is_maskable)

    @cached_property
    def _ngram_cdf(self) -> np.ndarray:
        weights = 1 / np.arange(1, self.max_ngram + 1)
        return np.cumsum(weights / weights.sum())[:-1]


def _cuts_of_long_words(starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tell for each token whether a long word is cut before it, beginning at any of its tokens.

    Nothing is drawn where no word is long: the masks of such rows are those without this.
    """
    first = np.flatnonzero(starts)
    size = np.diff(first, append=len(starts))
    is_long = size > LONGEST_WORD
    if not is_long.any():
        return np.zeros_like(starts)
    phase = rng.integers(LONGEST_WORD, size=len(size))
    place = np.arange(len(starts)) - np.repeat(first - phase, size)
    return np.repeat(is_long, size) & (place % LONGEST_WORD == 0)


def _differs(values: np.ndarray) -> np.ndarray:
    """Tell for each value whether it differs from the one before it; the first one does."""
    return np.diff(values, prepend=values[:1] - 1) != 0
