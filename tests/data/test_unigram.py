"""The level of token frequencies against plain counting."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from ds_deberta.data import NGramMasker, ShardDataset, SpecialTokens, loader
from ds_deberta.data.loader import IGNORE_INDEX
from ds_deberta.data.unigram import Unigram

SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, unk=3, mask=4)
ORDINARY = range(5, 9)
COUNTS = np.array([9, 9, 9, 9, 9, 59, 29, 7, 1])


def masker(mask_token_prob: float, keep_prob: float) -> NGramMasker:
    return NGramMasker(
        special=SPECIAL,
        is_word_start=np.ones(9, dtype=bool),
        num_tokens=9,
        max_seq_length=32,
        mask_token_prob=mask_token_prob,
        keep_prob=keep_prob,
    )


def test_a_masked_token_costs_what_its_frequency_says():
    visible, labels = np.full(4, SPECIAL.mask), np.array(ORDINARY)
    loss, correct = Unigram(COUNTS, SPECIAL).score(visible, labels, masker(1.0, 0.0))
    assert loss == pytest.approx(-sum(math.log(share) for share in (0.6, 0.3, 0.08, 0.02)))
    assert correct == 1  # the commonest


def test_no_model_without_context_predicts_kept_and_random_tokens_better():
    """By Bayes' rule over all that the masking rule may have done to a token."""
    shares = dict(zip(ORDINARY, (0.6, 0.3, 0.08, 0.02), strict=True))
    joint = {}  # of what is seen and what it was
    for label, drawn in itertools.product(ORDINARY, ORDINARY):
        joint[drawn, label] = shares[label] * (0.15 / 4 + 0.05 * (drawn == label))
    unigram = Unigram(COUNTS, SPECIAL)
    for seen in ORDINARY:
        total = sum(joint[seen, label] for label in ORDINARY)
        best = max(ORDINARY, key=lambda label: joint[seen, label])
        for label in ORDINARY:
            got = unigram.score(np.array([seen]), np.array([label]), masker(0.8, 0.05))
            assert got == (pytest.approx(-math.log(joint[seen, label] / total)), label == best)


def test_the_level_is_that_of_the_very_tokens_an_evaluation_predicts(data, tokenizer):
    rule = replace(
        masker(1.0, 0.0),
        special=tokenizer.special,
        is_word_start=tokenizer.is_word_start,
        num_tokens=tokenizer.num_tokens,
    )
    batches = loader.build_valid_batches(
        data_dir=data.folder, tokenizer=tokenizer, masker=rule, micro_batch_size=5, seed=1
    )
    train = ShardDataset(data.folder, "train", data.manifest)
    unigram = Unigram.of(train, tokenizer.num_tokens, tokenizer.special)
    loss, correct, count = unigram.score_batches(batches, rule)
    labels = np.concatenate([batch.labels.flatten() for batch in batches])
    labels = labels[labels != IGNORE_INDEX]
    text = np.concatenate([train[row] for row in range(len(train))])
    assert count == len(labels)
    assert loss / count == pytest.approx(unigram.cross_entropy(labels))
    assert correct == np.count_nonzero(labels == np.bincount(text).argmax())
    assert unigram.cross_entropy(text) < math.log(tokenizer.num_tokens - 5)
