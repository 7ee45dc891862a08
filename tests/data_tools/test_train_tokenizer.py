"""A trained vocabulary is a DeBERTa vocabulary, made as the public one, the same every time."""

import sys
from pathlib import Path

import pytest
import train_tokenizer as tool
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from sources import PIECE

from ds_deberta.data import DebertaTokenizer, SpecialTokens
from tests.conftest import sentences

TEXT = [*sentences(500), "caf\u00e9 \u4e2d\u6587 " * 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "spm.model"
    path.write_bytes(tool.train_tokenizer(TEXT, vocab_size=400))
    return path


def test_special_ids_are_debertas(model: Path):
    tokenizer = DebertaTokenizer(model)
    assert tokenizer.special == SpecialTokens(pad=0, cls=1, sep=2, unk=3, mask=400)
    assert tokenizer.num_tokens == 401
    assert tokenizer.pieces(range(5)) == ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<0x00>"]


def test_text_survives_with_characters_it_never_saw(model: Path):
    tokenizer = DebertaTokenizer(model)
    text = "the old king, caf\u00e9 \u4e2d\u6587 \U0001f600 \u0416 [MASK]"
    ids = tokenizer.encode(text)
    assert tokenizer.special.unk not in ids
    assert tokenizer.special.mask not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("\uff21\u2460  b\n") == tokenizer.encode("A1 b")  # nmt_nfkc


def test_settings_are_those_of_the_public_vocabulary(model: Path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    assert normalizer.name == "nmt_nfkc"
    assert normalizer.add_dummy_prefix
    assert normalizer.remove_extra_whitespaces
    assert normalizer.escape_whitespaces
    assert trainer.model_type == trainer.UNIGRAM
    assert trainer.byte_fallback
    assert trainer.split_by_unicode_script
    assert trainer.split_by_number
    assert trainer.split_by_whitespace
    assert not trainer.split_digits
    assert not trainer.treat_whitespace_as_suffix
    assert trainer.max_sentencepiece_length == 32


@pytest.mark.parametrize("max_lines", [200, 1000])
def test_the_same_text_gives_the_same_file(max_lines: int):
    first, second = (
        tool.train_tokenizer(TEXT, vocab_size=400, max_lines=max_lines) for _ in range(2)
    )
    assert first == second


def test_no_more_lines_are_used_than_asked_for():
    lines = [*sentences(2000), "zyzzyva " * 3]
    pieces = SentencePieceProcessor(
        model_proto=tool.train_tokenizer(lines, vocab_size=350, max_lines=200)
    )
    everything = SentencePieceProcessor(model_proto=tool.train_tokenizer(lines, vocab_size=350))
    assert pieces.serialized_model_proto() != everything.serialized_model_proto()


def test_long_lines_are_used():
    """sentencepiece drops lines of more than 4192 bytes unless told otherwise."""
    long_line = " ".join(f"{line} zyzzyva" for line in sentences(4000))
    assert len(long_line) > PIECE
    lines = list(tool.cut_lines([" \n" + long_line + "\n" + "the king"]))
    assert "".join(lines) == long_line + "the king"
    model = tool.train_tokenizer(lines, vocab_size=400)
    pieces = SentencePieceProcessor(model_proto=model).encode("zyzzyva", out_type=str)
    assert len(pieces) < 8


@pytest.mark.parametrize(
    ("lines", "vocab_size", "message"),
    [
        (["hello world"] * 3, 2048, "too small a corpus for 2048 pieces; it has 269 at most"),
        (TEXT, 270, "needs [23]\\d\\d pieces at least .* got 270"),
        ([], 300, "holds no text"),
        (["\u200b"], 300, "holds no text"),
    ],
)
def test_a_corpus_that_does_not_suffice_is_refused(lines: list[str], vocab_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        tool.train_tokenizer(lines, vocab_size=vocab_size)


def test_the_largest_size_named_is_possible():
    assert (
        len(
            SentencePieceProcessor(
                model_proto=tool.train_tokenizer(["hello world"] * 3, vocab_size=269)
            )
        )
        == 269
    )


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *map(str, flags)])
    return tool.main()


def test_the_command_is_quiet(tmp_path: Path, model: Path, monkeypatch, capfd):
    (tmp_path / "a.txt").write_text("\n".join(TEXT), encoding="utf-8")
    flags = ("-i", tmp_path / "a.txt", "-o", tmp_path / "new/spm.model", "--vocab_size", 400)
    assert run(monkeypatch, *flags) == 0
    assert (tmp_path / "new/spm.model").read_bytes() == model.read_bytes()
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1
    assert not err


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, monkeypatch, capfd):
    (tmp_path / "a.txt").write_text("hello world")
    flags = ("-i", tmp_path / "a.txt", "-o", tmp_path / "spm.model", "--vocab_size", 400)
    assert run(monkeypatch, *flags) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "spm.model").exists()
