import hashlib
import pickle

import pytest

from ds_deberta.data import DebertaTokenizer, SpecialTokens
from ds_deberta.data.tokenizer import _embedding_rows, _starts_word


def test_mask_is_appended_to_a_vocabulary_without_it(tokenizer, vocab_file):
    assert tokenizer.special == SpecialTokens(0, 1, 2, 3, mask=tokenizer.num_tokens - 1)
    assert tokenizer.pieces(range(4)) == ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    assert tokenizer.pieces([tokenizer.num_tokens - 1]) == ["[MASK]"]
    assert tokenizer.sha256 == hashlib.sha256(vocab_file.read_bytes()).hexdigest()


def test_a_mask_inside_the_vocabulary_is_used(tmp_path, train_vocabulary):
    tokenizer = DebertaTokenizer(
        train_vocabulary(tmp_path / "spm.model", control_symbols=["[MASK]"])
    )
    assert tokenizer.special.mask == 4
    assert tokenizer.pieces([4]) == ["[MASK]"]
    assert not set(tokenizer.encode("a [MASK] b")) & {0, 1, 2, 4}


def test_embedding_rows_are_those_of_the_public_checkpoints_or_a_multiple_of_64():
    assert _embedding_rows(128_001) == 128_100
    assert [_embedding_rows(n) for n in (1, 64, 65, 128_000)] == [64, 64, 128, 128_000]


def test_decode_gives_the_text_back(tokenizer, text):
    for line in text:
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert tokenizer.encode_batch(text) == [tokenizer.encode(line) for line in text]


def test_decode_spells_special_tokens_out(tokenizer):
    special = tokenizer.special
    ids = [special.cls, *tokenizer.encode("the lazy dog"), special.mask, special.sep, special.pad]
    assert tokenizer.decode(ids) == "[CLS] the lazy dog [MASK] [SEP] [PAD]"
    assert tokenizer.decode([]) == ""


def test_text_can_not_spell_special_tokens_and_unknown_characters_are_unk(tokenizer):
    ids = tokenizer.encode("the [MASK] [CLS] [SEP] [PAD] \u2603 dog")
    assert set(ids) & set(tokenizer.special.ids()) == {tokenizer.special.unk}
    assert max(ids) < tokenizer.num_tokens


def test_an_id_past_the_live_ones_is_an_error(tokenizer):
    with pytest.raises(IndexError):
        tokenizer.pieces([tokenizer.num_tokens])


@pytest.mark.parametrize(
    ("piece", "starts"),
    [
        ("\u2581the", True),
        ("\u2581", True),
        (",", True),
        ("$", True),  # ASCII, though Unicode calls it a symbol
        ("\u2014", True),  # an em dash
        ("\u00a0", True),
        ("\t", True),
        ("ing", False),
        ("s", False),
        ("\u20ac", False),  # the euro sign is no punctuation
        ("...", False),  # more than one character
        ("<0x0A>", False),
        ("\u4e2d\u56fd", True),  # Chinese and so on: the original's word would be a sentence
        ("\u3067\u3059", True),
        ("\u30ab\u30ca", True),
        ("\u0e44\u0e17\u0e22", True),
        ("\ud55c\uad6d", False),  # Korean has spaces
        ("\u0440\u0443\u0441", False),
    ],
)
def test_word_starts_follow_the_original_rule_but_in_scripts_without_spaces(piece, starts):
    assert _starts_word(piece) is starts


def test_word_start_table_matches_the_pieces(tokenizer):
    table = tokenizer.is_word_start
    assert table.shape == (tokenizer.num_tokens,)
    assert table[list(tokenizer.special.ids())].all()
    pieces = tokenizer.pieces(range(4, tokenizer.special.mask))
    assert [_starts_word(piece) for piece in pieces] == table[4 : tokenizer.special.mask].tolist()
    assert 0.1 < table.mean() < 0.9  # both kinds are there


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer, text):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(text[0]) == tokenizer.encode(text[0])
    assert copy.special == tokenizer.special


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary .*missing\.model.*train_tokenizer"):
        DebertaTokenizer(tmp_path / "missing.model")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100, b'{"model": 1}'])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model .*sentencepiece model"):
        DebertaTokenizer(path)


@pytest.mark.parametrize(
    "options",
    [
        {"pad_piece": "<pad>"},
        {"bos_id": 2, "eos_id": 1},
        {"pad_id": -1, "bos_id": 0, "eos_id": 1, "unk_id": 2},
        {"pad_id": -1, "bos_id": 1, "eos_id": 2, "unk_id": 3, "user_defined_symbols": ["[PAD]"]},
    ],
    ids=["other name", "other order", "no pad", "pad is an ordinary piece"],
)
def test_wrong_special_pieces_are_refused(tmp_path, train_vocabulary, options):
    path = train_vocabulary(tmp_path / "spm.model", **options)
    with pytest.raises(ValueError, match=r"first pieces must be \[PAD\], \[CLS\], \[SEP\], \[UNK"):
        DebertaTokenizer(path)


def test_a_mask_that_text_could_spell_is_refused(tmp_path, train_vocabulary):
    path = train_vocabulary(tmp_path / "spm.model", user_defined_symbols=["[MASK]"])
    with pytest.raises(ValueError, match="must be a control piece"):
        DebertaTokenizer(path)
