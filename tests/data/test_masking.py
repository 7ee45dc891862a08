"""Statistics of the masks. Tolerances are 5 binomial standard deviations; seeds are fixed."""

import numpy as np
import pytest

from ds_deberta.data import NGramMasker, masking
from ds_deberta.data.masking import LONGEST_WORD

NUM_TOKENS = 200
LENGTH = 512


def make_masker(special, **settings):
    """Every third id continues a word; so words of random rows have 1.5 tokens on average."""
    defaults = {
        "special": special,
        "is_word_start": np.arange(NUM_TOKENS) % 3 != 0,
        "num_tokens": NUM_TOKENS,
        "max_seq_length": LENGTH,
    }
    return NGramMasker(**defaults | settings)


def random_row(rng, special, length=LENGTH):
    ordinary = np.setdiff1d(np.arange(NUM_TOKENS), special.ids())
    return np.concatenate([[special.cls], rng.choice(ordinary, length - 2), [special.sep]])


def within_5_sigma(successes, trials, probability):
    sigma = np.sqrt(trials * probability * (1 - probability))
    return np.all(np.abs(successes - trials * probability) < 5 * sigma)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_outputs_agree_with_each_other(special, rng, max_ngram):
    masker = make_masker(special, max_ngram=max_ngram)
    ids = random_row(rng, special)
    before = ids.copy()
    masked, positions, labels = masker(ids, rng)
    np.testing.assert_array_equal(ids, before)  # the caller's row is left alone
    assert (np.diff(positions) > 0).all()
    np.testing.assert_array_equal(labels, ids[positions])
    rest = np.delete(np.arange(LENGTH), positions)
    np.testing.assert_array_equal(masked[rest], ids[rest])
    assert masked.dtype == ids.dtype


def test_the_same_generator_state_gives_the_same_mask(special, rng):
    masker = make_masker(special, max_ngram=3)
    ids = random_row(rng, special)
    results = [masker(ids, np.random.default_rng(seed)) for seed in (7, 7, 8)]
    for first, again in zip(*results[:2], strict=True):
        np.testing.assert_array_equal(first, again)
    assert not np.array_equal(results[0][0], results[2][0])


@pytest.mark.parametrize(
    ("length", "mask_prob", "capacity"),
    [(512, 0.15, 80), (128, 0.15, 20), (32, 0.15, 10), (20, 0.5, 10)],
)
def test_capacity_is_rounded_up_to_tens(special, length, mask_prob, capacity):
    masker = make_masker(special, max_seq_length=length, mask_prob=mask_prob)
    assert masker.max_predictions == capacity


@pytest.mark.parametrize(
    ("n", "budget"), [(3, 1), (4, 1), (10, 2), (100, 15), (300, 45), (512, 77)]
)
def test_unigrams_meet_the_budget_exactly(special, rng, n, budget):
    masker = make_masker(special)
    for _ in range(20):
        assert len(masker(random_row(rng, special, n), rng)[1]) == budget


def test_ngrams_meet_the_budget_and_overshoot_less_than_a_word(special, rng):
    masker = make_masker(special, max_ngram=3)
    for n, budget in [(3, 1), (100, 15), (512, 77)]:
        for _ in range(100):
            ids = random_row(rng, special, n)
            longest = max(len(word) for word in words_of(ids, masker))
            num_taken = len(masker(ids, rng)[1])
            assert budget <= num_taken < budget + longest or num_taken == 80


def test_unigrams_hit_every_position_alike(special, rng):
    masker = make_masker(special)
    hits, trials = np.zeros(LENGTH), 4000
    for _ in range(trials):
        hits[masker(random_row(rng, special), rng)[1]] += 1
    assert hits[0] == hits[-1] == 0
    assert within_5_sigma(hits[1:-1], trials, 77 / 510)
    # The last 50 together, where the original never masks; sampling without replacement
    # has a smaller deviation than the binomial.
    assert within_5_sigma(hits[-51:-1].sum(), 50 * trials, 77 / 510)


def test_ngrams_hit_every_position_alike(special, rng):
    masker = make_masker(special, max_ngram=3)
    trials = 4000
    hits = np.zeros((trials, LENGTH))
    for trial in range(trials):
        hits[trial, masker(random_row(rng, special), rng)[1]] = 1
    rate = hits[:, 1:-1].mean()
    assert 77 / 510 <= rate < 79 / 510
    assert within_5_sigma(hits[:, 1:-1].sum(axis=0), trials, rate)
    for edge in (slice(1, 51), slice(-51, -1)):
        # Neighbours go together, so the deviation comes from the rows, which are independent.
        excess = hits[:, edge].mean(axis=1) - hits[:, 1:-1].mean(axis=1)
        assert abs(excess.mean()) < 5 * excess.std() / np.sqrt(trials)


def test_ngrams_hit_every_position_of_a_short_row_alike(special, rng):
    """Where one n-gram spends the budget, an uneven cut into n-grams would show."""
    masker = make_masker(special, max_ngram=3, is_word_start=np.ones(NUM_TOKENS, dtype=bool))
    hits, trials = np.zeros(12), 10_000
    for _ in range(trials):
        positions = masker(random_row(rng, special, 12), rng)[1]
        assert len(positions) == 2
        hits[positions] += 1
    assert within_5_sigma(hits[1:-1], trials, 2 / 10)


def test_a_row_with_unlike_halves_is_masked_alike_in_both(special, rng):
    """Candidates and not positions count: [UNK] in the first half must not thin out the other."""
    masker = make_masker(special)
    ids = random_row(rng, special)
    ids[1:256:2] = special.unk
    hits, trials = np.zeros(LENGTH), 2000
    for _ in range(trials):
        hits[masker(ids, rng)[1]] += 1
    candidates = np.flatnonzero((ids != special.unk) & (ids > special.sep))
    assert within_5_sigma(hits[candidates], trials, 77 / len(candidates))
    assert hits.sum() == hits[candidates].sum()


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_special_tokens_are_never_masked(special, rng, max_ngram):
    masker = make_masker(special, max_ngram=max_ngram)
    for _ in range(200):
        ids = random_row(rng, special, 64)
        ids[rng.integers(1, 63, size=30)] = rng.choice(special.ids(), 30)
        _, positions, labels = masker(ids, rng)
        assert len(positions) > 0
        assert not np.isin(labels, special.ids()).any()


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_a_row_without_candidates_has_no_predictions(special, rng, max_ngram):
    masker = make_masker(special, max_ngram=max_ngram)
    for content in ([], [special.unk], [special.pad, special.mask, special.sep]):
        ids = np.array([special.cls, *content, special.sep])
        masked, positions, labels = masker(ids, rng)
        np.testing.assert_array_equal(masked, ids)
        assert len(positions) == len(labels) == 0


def test_predicted_tokens_are_split_into_mask_keep_and_random(special, rng):
    masker = make_masker(special)
    is_mask = is_kept = is_random = trials = 0
    drawn = np.zeros(NUM_TOKENS)
    for _ in range(3000):
        masked, positions, labels = masker(random_row(rng, special), rng)
        new = masked[positions]
        trials += len(new)
        is_mask += (new == special.mask).sum()
        is_kept += (new == labels).sum()
        is_random += ((new != special.mask) & (new != labels)).sum()
        drawn += np.bincount(new[(new != special.mask) & (new != labels)], minlength=NUM_TOKENS)
    num_ordinary = NUM_TOKENS - 5
    by_chance = 0.1 / num_ordinary  # a random token may be the right one
    assert within_5_sigma(is_mask, trials, 0.8)
    assert within_5_sigma(is_kept, trials, 0.1 + by_chance)
    assert within_5_sigma(is_random, trials, 0.1 - by_chance)
    # Every live id that is not special is drawn, all alike; no special one, and none past the end.
    assert len(drawn) == NUM_TOKENS
    assert drawn[list(special.ids())].sum() == 0
    ordinary = np.delete(drawn, special.ids())
    assert within_5_sigma(ordinary, drawn.sum(), 1 / num_ordinary)


def test_replaced_token_detection_masks_with_mask_only(special, rng):
    masker = make_masker(special, mask_token_prob=1.0, keep_prob=0.0)
    for _ in range(50):
        masked, positions, _ = masker(random_row(rng, special), rng)
        assert (masked[positions] == special.mask).all()


def test_keep_only_changes_nothing(special, rng):
    masker = make_masker(special, mask_token_prob=0.0, keep_prob=1.0)
    ids = random_row(rng, special)
    masked, positions, _ = masker(ids, rng)
    np.testing.assert_array_equal(masked, ids)
    assert len(positions) == 77


def test_ngram_lengths_follow_one_over_n(special, rng):
    """In long rows with few masks, where two n-grams seldom touch, runs are n-grams."""
    masker = make_masker(
        special,
        max_ngram=3,
        mask_prob=0.005,
        max_seq_length=20_000,
        is_word_start=np.ones(NUM_TOKENS, dtype=bool),
    )
    counts = np.zeros(8)
    for _ in range(200):
        positions = masker(random_row(rng, special, 20_000), rng)[1]
        runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        counts += np.bincount([len(run) for run in runs], minlength=8)[:8]
    shares, total = counts[1:4] / counts.sum(), counts.sum()
    expected = np.array([6, 3, 2]) / 11
    # 0.01: about 1 % of the runs touch, and about 1 % are cut by the budget.
    tolerance = 5 * np.sqrt(expected * (1 - expected) / total) + 0.01
    assert total > 10_000
    assert (np.abs(shares - expected) < tolerance).all()


def words_of(ids, masker):
    """The original's grouping, literally: positions of each whole word."""
    words = []
    for position, token in enumerate(ids.tolist()):
        if token in masker.special.ids():
            continue
        if words and not masker.is_word_start[token]:
            words[-1].append(position)
        else:
            words.append([position])
    return words


def test_whole_words_are_never_split(special, rng):
    masker = make_masker(special, max_ngram=3)
    num_long = 0
    for _ in range(300):
        ids = random_row(rng, special)
        ids[rng.integers(1, LENGTH - 1, size=20)] = special.unk  # does not end a word
        taken = set(masker(ids, rng)[1].tolist())
        words = [word for word in words_of(ids, masker) if len(word) <= LONGEST_WORD]
        split = [word for word in words if 0 < len(taken.intersection(word)) < len(word)]
        # Only the word that would not fit is cut.
        assert len(split) <= (len(taken) == masker.max_predictions)
        num_long += sum(len(word) > 2 and word[0] in taken for word in words)
    assert num_long > 100  # there were words to split


def test_a_word_beyond_the_capacity_is_cut_there(special, rng):
    starts = np.zeros(NUM_TOKENS, dtype=bool)
    masker = make_masker(special, max_ngram=3, is_word_start=starts)
    assert len(masker(random_row(rng, special), rng)[1]) == 80  # the row is one word of 510
    starts[:10] = True  # words of 28 tokens
    counts = [len(masker(random_row(rng, special), rng)[1]) for _ in range(200)]
    assert max(counts) == 80
    assert min(counts) >= 77


def packed_row(rng, special, length, documents):
    """Documents of `length` ids each, with [CLS] and [SEP]."""
    row = random_row(rng, special, length * documents)
    row[::length], row[length - 1 :: length] = special.cls, special.sep
    return row


def longest_run(positions):
    """How many neighbours the longest row of them has."""
    groups = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return max(map(len, groups))


def test_a_row_that_is_one_word_is_masked_in_short_runs_anywhere(special, rng):
    """As text without spaces, or an encoded picture, is."""
    masker = make_masker(special, is_word_start=np.zeros(NUM_TOKENS, dtype=bool), max_ngram=2)
    hits, rows = np.zeros(LENGTH), 3000
    for _ in range(rows):
        _, positions, _ = masker(random_row(rng, special), rng)
        assert len(positions) <= masker.max_predictions
        hits[positions] += 1
        assert longest_run(positions) <= 8 * LONGEST_WORD  # of a word each, side by side by chance
    inner = hits[20:-20] / rows
    assert abs(inner.mean() - 0.15) < 0.01
    # Runs begin and end at any token: no position is masked much more or less than others.
    assert np.abs(inner - inner.mean()).max() < 6 * np.sqrt(0.15 * 0.85 / rows)


def test_masks_of_rows_without_long_words_are_what_they_were(special, rng, monkeypatch):
    masker, rows = make_masker(special, max_ngram=3), [random_row(rng, special) for _ in range(30)]
    is_short = [longest_run(np.flatnonzero(row % 3 == 0)) < LONGEST_WORD for row in rows]
    assert sum(is_short) > 10
    found = [masker(row, np.random.default_rng(5))[1] for row in rows]
    monkeypatch.setattr(masking, "LONGEST_WORD", LENGTH)
    for row, positions, same in zip(rows, found, is_short, strict=True):
        if same:
            np.testing.assert_array_equal(masker(row, np.random.default_rng(5))[1], positions)


def test_runs_of_words_end_with_their_document(special, rng):
    """Few masks in documents of three words: runs would often reach into the next document."""
    starts = np.ones(NUM_TOKENS, dtype=bool)
    settings = {"max_seq_length": 20_000, "mask_prob": 0.005, "is_word_start": starts}
    masker = make_masker(special, max_ngram=3, **settings)
    both = inside = 0
    for _ in range(100):
        taken = np.zeros((4000, 5), dtype=bool)
        taken.flat[masker(packed_row(rng, special, 5, 4000), rng)[1]] = True
        assert not taken[:, [0, 4]].any()
        both += (taken[:-1, 3] & taken[1:, 1]).sum()
        inside += (taken[:, 1] & taken[:, 2]).sum()
    assert inside > 500
    assert both < inside / 20  # by chance


def test_words_end_with_their_document(special, rng):
    """The second piece of a long document may start within a word."""
    masker = make_masker(
        special, max_ngram=3, mask_prob=0.05, is_word_start=np.zeros(NUM_TOKENS, dtype=bool)
    )
    seen = set()
    for _ in range(50):
        positions = masker(packed_row(rng, special, 8, 64), rng)[1]
        documents, counts = np.unique(positions // 8, return_counts=True)
        assert len(documents) == 5  # of 6 tokens each, for a budget of 26
        assert (counts == 6).all()
        seen.update(documents)
    assert len(seen) > 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_prob": 0.0}, "mask_prob must be in"),
        ({"mask_prob": 1.5}, "mask_prob must be in"),
        ({"max_ngram": 0}, "max_ngram must be at least 1"),
        ({"mask_token_prob": 0.8, "keep_prob": 0.3}, "nor more than 1 together"),
        ({"keep_prob": -0.1}, "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(special, settings, message):
    with pytest.raises(ValueError, match=message):
        make_masker(special, **settings)
