"""The normalizers for Hugging Face against sentencepiece, which they must equal."""

import random
from functools import cache
from pathlib import Path
from unicodedata import category, normalize

import pytest

from ds_deberta.data import DebertaTokenizer
from ds_deberta.hf_normalizer import CharsMap, build_normalizer
from ds_deberta.hf_tokenizer import read_vocabulary
from tests.test_hf_tokenizer import export, train

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
DECOMPOSED = [
    "Ti\u1ebfng Vi\u1ec7t, Nguy\u1ec5n \u1eef \u1eb7 \u1ec5",
    "\ub300\ud55c\ubbfc\uad6d \uc11c\uc6b8",
    "\uff76\uff9e\uff77\uff9e\uff8a\uff9f \u304c\u30d1 \uffa1\uffc2",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05dd \ufb2a \ufefb \u0928\u093c \u0e19\u0e49\u0e33",
    "\u212b \uff21\u0301 \u2460\u0323 \ufb03\u0302 \u1e9b\u0323 \u0344 \u03a9\u0345",
]


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes for what it does not know, so that no character is the same as another."""
    return train(tmp_path_factory.mktemp("bytes"), byte_fallback=True, vocab_size=380)


def charsmap(vocab_file: Path) -> bytes:
    return read_vocabulary(vocab_file).normalizer_spec.precompiled_charsmap


@cache
def pools(rules: bytes) -> tuple[list[str], ...]:
    """Characters of all scripts, and more often those that rules and graphemes are about."""
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    everything = [chr(code) for code in codes if category(chr(code)) not in ("Cn", "Co")]
    marks = [character for character in everything if category(character)[0] == "M"]
    keys = [key for key, _ in CharsMap(rules).suffixes(0)]
    jamo = [
        chr(i) for i in (*range(0x1100, 0x1200), *range(0x3131, 0x318F), *range(0xFFA1, 0xFFBF))
    ]
    joiners = [*"\u200c\u200d\u034f\ufe0f\u20e3\u0e33\x01\x7f \u00a0\u3000\t\u2581", "\r\n"]
    emoji = ["\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea"]
    return (everything, marks, marks, keys, [k for k in keys if len(k) == 1], jamo, joiners + emoji)


def random_text(rng: random.Random, rules: bytes) -> str:
    sources = rng.choices(pools(rules), k=3)
    text = "".join(rng.choice(rng.choice(sources)) for _ in range(rng.randint(1, 20)))
    form = rng.choice(("", *FORMS))
    return normalize(form, text) if form else text


def test_text_of_all_scripts_in_any_normal_form_gets_the_same_ids(vocab_file: Path, tmp_path: Path):
    ours, theirs = DebertaTokenizer(vocab_file), export(vocab_file, tmp_path / "out")
    rng, rules = random.Random(0), charsmap(vocab_file)
    texts = [normalize(form, text) for text in DECOMPOSED for form in FORMS]
    texts += [random_text(rng, rules) for _ in range(10_000)]
    found = theirs(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for text, ids, right in zip(texts, found, ours.encode_batch(texts), strict=True):
        assert ids == right, ascii(text)


def test_each_rule_of_the_vocabulary_is_followed(vocab_file: Path):
    rules = charsmap(vocab_file)
    normalizer = build_normalizer(rules)
    keys = CharsMap(rules).suffixes(0)
    assert len(keys) > 200_000
    sample = random.Random(0).sample(keys, 10_000)
    sample += [(key, value) for key, value in keys if ord(max(key)) > 0x10000 and len(key) > 1]
    for key, value in sample:
        assert normalizer.normalize_str(f"x{key}y") == f"x{value}y", ascii(key)


def test_rules_that_compose_in_another_way_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rules = tmp_path / "rules.tsv"  # in hexadecimal: "ab" becomes "c", "a" becomes "d"
    rules.write_text("61 62\t63\n61\t64\n28 63 29\tA9\n")
    custom = charsmap(train(tmp_path, normalization_rule_tsv=str(rules)))
    normalizer = build_normalizer(custom)
    assert normalizer.normalize_str("a (c) bb") == "d \u00a9 bb"
    assert (
        "cannot follow 1 of the vocabulary's 3 normalization rules: text with 'ab'" in caplog.text
    )


def test_a_token_knows_its_place_in_the_text(vocab_file: Path, tmp_path: Path):
    theirs = export(vocab_file, tmp_path / "out")
    for text in ("caf\u00e9s dog", normalize("NFD", "caf\u00e9s dog")):
        found = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        start, end = found["offset_mapping"][-1]
        assert end == len(text)
        assert text[start:end].strip() in ("g", "og", "dog")
        assert found["offset_mapping"][0][0] == 0
