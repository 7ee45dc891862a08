"""A trained vocabulary is a DeBERTa vocabulary, made as the public one, the same every time."""

import base64
import os
import pty
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest
import train_tokenizer as tool
from lines import LONGEST_RUN, CutRuns, cut_lines
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from sources import PIECE

from ds_deberta.data import DebertaTokenizer, SpecialTokens
from tests.conftest import sentences
from tests.launch import clean_environment

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
    """By default sentencepiece drops lines of more than 4192 bytes."""
    long_line = " ".join(f"{line} zyzzyva" for line in sentences(4000))
    assert len(long_line) > PIECE
    lines = list(cut_lines([" \n" + long_line + "\n" + "the king"], CutRuns()))
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


def test_a_long_run_without_spaces_does_not_spoil_the_vocabulary(tmp_path, monkeypatch, capsys):
    """With this run of base64 as it is, sentencepiece finds 948 pieces in all of the text."""
    rng = random.Random(7)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(4000)]
    weights = [1 / (number + 3) for number in range(len(words))]
    lines = [" ".join(rng.choices(words, weights, k=400)) for _ in range(100)]
    run_of_base64 = "data:;base64," + base64.b64encode(rng.randbytes(60_000)).decode()
    (tmp_path / "a.txt").write_text("\n".join([*lines, f"See {run_of_base64}", "-" * 100_000]))
    flags = ("-i", tmp_path / "a.txt", "-o", tmp_path / "spm.model", "--vocab_size", 1000)
    assert run(monkeypatch, *flags) == 0
    without = SentencePieceProcessor(model_proto=tool.train_tokenizer(lines, vocab_size=1000))
    with_run = SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    tokens = [sum(map(len, processor.encode(lines))) for processor in (without, with_run)]
    assert tokens[1] < 1.06 * tokens[0]
    out = capsys.readouterr().out
    assert "cut 2 runs of more than 1,000 characters without a space, the longest of 100,000" in out
    assert "The first begins with data:;base64," in out


@pytest.mark.parametrize("space", [" ", "\t", "\u3000", "\u200b", "\ufeff"])
def test_lines_without_a_long_run_stay_as_they_are(space: str):
    words = ["x" * LONGEST_RUN, "\u4e2d" * (LONGEST_RUN - 1), "y", "z" * LONGEST_RUN]
    runs = CutRuns()
    assert list(cut_lines([space.join(words)], runs)) == [space.join(words)]
    assert not runs.report()


@pytest.mark.parametrize("character", ["\u4e2d", "\u0e01", "\x1f", "\x0b"])
def test_runs_of_any_script_are_cut_and_nothing_is_lost(character: str):
    """Chinese, Japanese and Thai have no spaces; sentencepiece drops some control characters."""
    line = "one " + "\u4e2d" * 600 + character * 2000 + " \u6587"
    runs = CutRuns()
    (cut,) = cut_lines([line], runs)
    assert max(map(len, cut.split(" "))) == LONGEST_RUN
    assert cut.replace(" ", "") == line.replace(" ", "")
    assert (runs.count, runs.longest) == (1, 2600)


def test_ctrl_c_while_it_trains_ends_it_and_leaves_nothing(tmp_path: Path):
    """On a terminal, which shows the seconds."""
    rng = random.Random(0)
    (tmp_path / "a.txt").write_text(
        "\n".join(" ".join(str(rng.random()) for _ in range(5000)) for _ in range(8))
    )
    shown, terminal = pty.openpty()
    flags = ("-i", tmp_path / "a.txt", "-o", tmp_path / "spm.model", "--vocab_size", 400)
    process = psutil.Popen(
        [sys.executable, tool.__file__, *map(str, flags)],
        env=clean_environment(),
        stderr=terminal,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(terminal)
    output = b""
    while b"training the vocabulary: " not in output:
        output += os.read(shown, 1000)
    assert not process.children()  # so none can stay
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert b"stopped" in output + os.read(shown, 1000)
    os.close(shown)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
