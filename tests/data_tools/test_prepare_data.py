"""The prepared folder: what is in it, that it survives any crash, and what is refused."""

import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import prepare_data
import psutil
import pytest
from encoding import AHEAD, Chunk, _load_processor, choose_split, encode_chunks, encode_records
from restart import locked
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from sources import PIECE, Record, read_records
from train_tokenizer import train_tokenizer

from ds_deberta.data import Manifest, ShardDataset
from ds_deberta.data.shards import checksum
from tests.conftest import sentences
from tests.data_tools.dumps import dump
from tests.launch import clean_environment

ROW_LENGTH = 30
CLS, SEP = 1, 2


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """120 documents of a few lines, some of them empty."""
    rng = random.Random(0)
    lines = sentences(400, seed=3)
    documents = ["\n".join(rng.sample(lines, rng.randint(1, 8))) for _ in range(117)]
    return [*documents[:50], "", " \n", *documents[50:], ""]


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    return path


@pytest.fixture
def prepare(vocab_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody pulls the plug

    def run(*flags: object, vocab: Path = vocab_file, workers: int = 0) -> int:
        argv = ["prepare_data.py", "--vocab", vocab, "--workers", workers, *flags]
        if "--max_seq_length" not in flags:
            argv += ["--max_seq_length", ROW_LENGTH + 2]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        _load_processor.cache_clear()
        return prepare_data.main()

    return run


def read_rows(folder: Path, split: str) -> list[list[int]]:
    dataset = ShardDataset(folder, split, Manifest.load(folder))
    dataset.verify()
    return [dataset[row].tolist() for row in range(len(dataset))]


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cut(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + ROW_LENGTH] for start in range(0, len(ids), ROW_LENGTH)]


@pytest.fixture(scope="module")
def encoded(texts: list[str], vocab_file: Path) -> list[list[int]]:
    """The ids of every document, from sentencepiece itself."""
    return SentencePieceProcessor(model_file=str(vocab_file)).encode(texts)


def test_documents_are_joined_and_cut(prepare, tmp_path: Path, corpus: Path, encoded):
    assert prepare("-i", corpus, "-o", tmp_path / "d", "--valid_fraction", 0.1) == 0
    manifest = Manifest.load(tmp_path / "d")
    valid = ids_of_split(manifest, tmp_path / "d", "valid")
    train = ids_of_split(manifest, tmp_path / "d", "train")
    # Which documents are for validation is found by their ids, not by the rule that chose them.
    chosen, position = [], 0
    for number, ids in enumerate(encoded):
        if ids and valid[position : position + len(ids)] == ids:
            chosen.append(number)
            position += len(ids)
    assert position == len(valid)
    assert train == [i for n, ids in enumerate(encoded) if n not in chosen for i in ids]
    assert 9 <= len(chosen) <= 13
    assert read_rows(tmp_path / "d", "train") == cut(train)
    assert read_rows(tmp_path / "d", "valid") == cut(valid)
    assert manifest.splits["valid"].documents == len(chosen)
    assert manifest.splits["train"].documents == sum(map(bool, encoded)) - len(chosen)
    assert manifest.max_seq_length == ROW_LENGTH + 2
    assert not manifest.keep_documents_apart


def ids_of_split(manifest: Manifest, folder: Path, split: str) -> list[int]:
    ids = [i for row in read_rows(folder, split) for i in row]
    assert manifest.splits[split].tokens == len(ids)
    return ids


def test_documents_can_be_kept_apart(prepare, tmp_path: Path, corpus: Path, encoded):
    flags = ("--keep_documents_apart", "--valid_fraction", 0)
    assert prepare("-i", corpus, "-o", tmp_path / "d", *flags) == 0
    assert read_rows(tmp_path / "d", "train") == [row for ids in encoded for row in cut(ids)]
    assert read_rows(tmp_path / "d", "valid") == []
    assert Manifest.load(tmp_path / "d").keep_documents_apart


def unpacked(rows: list[list[int]]) -> list[list[int]]:
    """The pieces of documents in packed rows."""
    pieces: list[list[int]] = []
    for row in rows:
        pieces.append([])
        for i in row:
            if i == CLS:
                assert pieces[-1].pop() == SEP
                pieces.append([])
            else:
                pieces[-1].append(i)
    return pieces


def test_documents_can_be_packed(prepare, tmp_path: Path, corpus: Path, encoded, capsys):
    flags = ("--pack_documents", "--valid_fraction", 0, "--max_seq_length", 102)
    assert prepare("-i", corpus, "-o", tmp_path / "d", *flags) == 0
    manifest = Manifest.load(tmp_path / "d")
    assert manifest.packed
    rows = read_rows(tmp_path / "d", "train")
    expected = [ids[at : at + 100] for ids in encoded for at in range(0, len(ids), 100)]
    assert sorted(unpacked(rows)) == sorted(expected)
    assert max(map(len, rows)) <= 100
    assert len(rows) < 0.9 * len(expected)
    split = manifest.splits["train"]
    assert (split.rows, split.tokens) == (len(rows), sum(map(len, rows)))
    assert split.documents == 117
    fill = (split.tokens + 2 * len(rows)) / (102 * len(rows))
    assert fill > 0.95
    assert f"rows {fill:.1%} full" in capsys.readouterr().out


def test_packing_and_keeping_apart_exclude_each_other(prepare, tmp_path, corpus, capsys):
    with pytest.raises(SystemExit) as error:
        prepare("-i", corpus, "-o", tmp_path, "--pack_documents", "--keep_documents_apart")
    assert error.value.code == 2
    assert "must not be given together" in capsys.readouterr().err


def test_validation_can_have_files_of_its_own(prepare, tmp_path: Path, corpus: Path, vocab_file):
    lines = sentences(100, seed=8)
    (tmp_path / "v.txt").write_text("\n".join(lines))
    assert prepare("-i", corpus, "-o", tmp_path / "d", "--valid_input", tmp_path / "v.txt") == 0
    ids = SentencePieceProcessor(model_file=str(vocab_file)).encode("\n".join(lines))
    assert read_rows(tmp_path / "d", "valid") == cut(ids)
    assert Manifest.load(tmp_path / "d").splits["train"].documents == 117


@pytest.mark.parametrize("parted_by", ["blank_line", "line"])
def test_one_text_file_can_hold_many_documents(prepare, tmp_path, texts, encoded, parted_by):
    """They are prepared as the same documents of JSON lines are."""
    number_of_lines = [text.count("\n") + 1 for text in texts if text.strip()]
    end = "\n \n" if parted_by == "blank_line" else "\n"
    (tmp_path / "a.txt").write_text(end.join(text for text in texts if text.strip()))
    flags = ("-i", tmp_path / "a.txt", "--documents", parted_by, "--valid_fraction", 0.1)
    assert prepare(*flags, "-o", tmp_path / "d") == 0
    manifest = Manifest.load(tmp_path / "d")
    assert manifest.documents == parted_by
    documents = {split: info.documents for split, info in manifest.splits.items()}
    whole = len(number_of_lines) if parted_by == "blank_line" else sum(number_of_lines)
    assert sum(documents.values()) == whole
    assert documents["valid"] == pytest.approx(whole / 10, abs=3)
    ids = [i for split in documents for i in ids_of_split(manifest, tmp_path / "d", split)]
    assert sorted(ids) == sorted(i for document in encoded for i in document)


def test_the_vocabulary_goes_with_the_data(prepare, tmp_path: Path, corpus: Path, vocab_file: Path):
    assert prepare("-i", corpus, "-o", tmp_path / "d") == 0
    assert (tmp_path / "d/spm.model").read_bytes() == vocab_file.read_bytes()


def test_what_is_left_out_of_a_folder_is_reported(tmp_path: Path, capsys):
    for name in ("a.jsonl", "notes.md", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    flags = ["-i", str(tmp_path), "-o", "d", "--vocab", "v"]
    (only,) = prepare_data.find_inputs(prepare_data.parse_args(flags))
    assert only.path == tmp_path / "a.jsonl"
    out = capsys.readouterr().out
    assert f"left out 1 file of another kind: {tmp_path / 'notes.md'}" in out
    assert f"left out 1 hidden file or folder: {tmp_path / '.ipynb_checkpoints'}" in out


def test_counts_are_reported(prepare, tmp_path: Path, corpus: Path, capsys):
    assert prepare("-i", corpus, "-o", tmp_path / "d", "--valid_fraction", 0) == 0
    out = capsys.readouterr().out
    split = Manifest.load(tmp_path / "d").splits["train"]
    assert f"train: {split.rows:,} rows, {split.tokens:,} tokens, 117 documents" in out
    assert "(and 3 empty ones)" in out
    assert "tokens/s" in out


def test_any_number_of_workers_gives_the_same_folder(prepare, tmp_path: Path, corpus, monkeypatch):
    monkeypatch.setattr("encoding.CHUNK", 500)  # many chunks
    for workers in (0, 3):
        assert prepare("-i", corpus, "-o", tmp_path / str(workers), workers=workers) == 0
    assert read_bytes(tmp_path / "0") == read_bytes(tmp_path / "3")


class CrashError(BaseException):
    """Not an error that anybody handles."""


@contextmanager
def crash_at(n: int, *, renamed: bool) -> Iterator[None]:
    """Crash when the n-th file gets its name, before or after it has it."""
    replace, calls = Path.replace, 0

    def crash(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == n and not renamed:
            raise CrashError
        result = replace(self, target)
        if calls == n:
            raise CrashError
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        yield


@pytest.mark.parametrize("mode", [(), ("--keep_documents_apart",), ("--pack_documents",)])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_crash_at_any_moment_leaves_no_trace(prepare, tmp_path, corpus, texts, mode, renamed):
    second = tmp_path / "b.jsonl"
    second.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::-1]))
    flags = ("-i", corpus, second, "--valid_fraction", 0.2, "--rows_per_shard", 300, *mode)
    assert prepare(*flags, "-o", tmp_path / "whole") == 0
    whole = read_bytes(tmp_path / "whole")
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        try:
            with crash_at(n, renamed=renamed):
                prepare(*flags, "-o", folder)
            break  # it had no n-th file to name
        except CrashError:
            assert prepare(*flags, "-o", folder) == 0
            assert read_bytes(folder) == whole, f"after crash {n}"
    assert n > 10


def test_after_a_crash_nothing_finished_is_read_or_encoded_again(
    prepare, tmp_path: Path, corpus: Path, monkeypatch
):
    second = tmp_path / "b.jsonl.gz"
    second.write_bytes(corpus.read_bytes())
    monkeypatch.setattr("encoding.CHUNK", 500)  # many chunks
    read: list[str] = []
    encoded: list[Record] = []

    def spy_read(raw: IO[bytes], **options: str) -> Iterator[Record]:
        read.append(raw.name)
        return read_records(raw, **options)

    def spy_encode(records: list[Record], **options: object):
        encoded.extend(records)
        return encode_records(records, **options)

    monkeypatch.setattr("encoding.read_records", spy_read)
    monkeypatch.setattr("encoding.encode_records", spy_encode)
    flags = ("-i", corpus, second, "-o", tmp_path / "d", "--valid_fraction", 0)
    flags += ("--rows_per_shard", 150)
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target.name == "00013.arrow":
            raise CrashError
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(CrashError):
            prepare(*flags)
    state = json.loads((tmp_path / "d/preparation.json").read_text())
    file, record = state["progress"]["train"]["place"]
    assert len(state["progress"]["train"]["shards"]) == 13
    assert file == 1
    assert 20 < record < 110
    read.clear()
    encoded.clear()
    assert prepare(*flags) == 0
    assert read == [str(second)]
    assert [each.place - 1 for each in encoded] == list(range(record, 120))


def test_a_killed_command_goes_on_and_leaves_no_processes(tmp_path: Path, vocab_file: Path):
    """The real thing: SIGKILL to a command with workers."""
    path = tmp_path / "a.jsonl"
    lines = sentences(1000)
    with path.open("w") as out:
        out.writelines(json.dumps({"text": line}) + "\n" for line in lines * 50)
    command = [sys.executable, prepare_data.__file__, "-i", path, "--vocab", vocab_file]
    command += ["--max_seq_length", 32, "--rows_per_shard", 3000, "--workers", 2]
    command = [str(word) for word in command]
    process = psutil.Popen([*command, "-o", str(tmp_path / "killed")], env=clean_environment())
    while not (tmp_path / "killed/train/00001.arrow").exists():
        assert process.poll() is None
        time.sleep(0.01)
    workers = process.children(recursive=True)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/manifest.json").exists()
    for folder in ("killed", "whole"):
        subprocess.run(
            [*command, "-o", tmp_path / folder],
            check=True,
            capture_output=True,
            env=clean_environment(),
        )
    assert read_bytes(tmp_path / "killed") == read_bytes(tmp_path / "whole")
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_finished_folder_is_left_alone(prepare, tmp_path: Path, corpus: Path, capsys):
    flags = ("-i", corpus, "-o", tmp_path / "d")
    assert prepare(*flags) == 0
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    capsys.readouterr()
    assert prepare(*flags, workers=2) == 0  # the number of workers is no setting
    assert "is ready" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}


def test_a_damaged_folder_is_not_called_ready(prepare, tmp_path: Path, corpus: Path, capsys):
    flags = ("-i", corpus, "-o", tmp_path / "d")
    assert prepare(*flags) == 0
    before = read_bytes(tmp_path / "d")
    shard = tmp_path / "d/train/00000.arrow"
    shard.write_bytes(bytes(shard.stat().st_size))  # of the right size
    assert prepare(*flags, "--overwrite") == 0
    assert read_bytes(tmp_path / "d") == before
    shard.unlink()
    assert prepare(*flags) == 2
    assert "00000.arrow of manifest.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--max_seq_length", 64), "max_seq_length: 32 then, 64 now"),
        (("--keep_documents_apart",), "keep_documents_apart: False then, True now"),
        (("--pack_documents",), "pack_documents: False then, True now"),
        (("--seed", 1), "seed: 0 then, 1 now"),
        (("--documents", "line"), "documents: file then, line now"),
        ("vocabulary", "vocabulary: "),
        ("input", "input: 2 files"),
    ],
)
def test_other_settings_need_overwrite(
    prepare, tmp_path: Path, corpus: Path, vocab_file: Path, capsys, change, message: str
):
    source, vocab = tmp_path / "a.jsonl.gz", tmp_path / "spm.model"
    source.write_bytes(corpus.read_bytes())
    vocab.write_bytes(vocab_file.read_bytes())
    (tmp_path / "b.txt").write_text("\n".join(sentences(5)))
    flags = ["-i", source, tmp_path / "b.txt", "-o", tmp_path / "d", "--rows_per_shard", 50]
    assert prepare(*flags, vocab=vocab) == 0
    before = read_bytes(tmp_path / "d")
    if change == "input":
        os.utime(source, (1, 1))
    elif change == "vocabulary":
        model = SentencePieceProcessor(model_file=str(vocab)).serialized_model_proto()
        vocab.write_bytes(model + b"\x1a\x00")  # one more, empty normaliser field: the same model
    else:
        flags += change
    assert prepare(*flags, vocab=vocab) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--overwrite" in error
    assert read_bytes(tmp_path / "d") == before
    assert prepare(*flags, "--overwrite", vocab=vocab) == 0
    assert prepare(*flags[:4], tmp_path / "fresh", *flags[5:], vocab=vocab) == 0
    assert read_bytes(tmp_path / "d") == read_bytes(tmp_path / "fresh")


def test_a_folder_of_an_earlier_version_goes_on(prepare, tmp_path: Path, corpus: Path, capsys):
    flags = ("-i", corpus, "-o", tmp_path / "d", "--rows_per_shard", 50)
    assert prepare(*flags) == 0
    before = read_bytes(tmp_path / "d")
    state = json.loads(before["preparation.json"])
    del state["sha256"], state["settings"]["pack_documents"], state["settings"]["documents"]
    for each in state["progress"].values():
        assert each.pop("open_rows") == []
    (tmp_path / "d/preparation.json").write_text(json.dumps(state))
    manifest = json.loads(before["manifest.json"])
    del manifest["sha256"], manifest["packed"], manifest["documents"]
    manifest["sha256"] = checksum(manifest)
    (tmp_path / "d/manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert prepare(*flags) == 0
    assert "is ready" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "d").documents == "file"
    (tmp_path / "d/manifest.json").unlink()
    assert prepare(*flags) == 0
    assert read_bytes(tmp_path / "d") == before


def test_things_of_other_origin_are_not_touched(prepare, tmp_path: Path, corpus: Path, capsys):
    (tmp_path / "d/train").mkdir(parents=True)
    (tmp_path / "d/train/mine.arrow").write_text("x")
    assert prepare("-i", corpus, "-o", tmp_path / "d", "--overwrite") == 2
    assert "of other origin" in capsys.readouterr().err
    assert (tmp_path / "d/train/mine.arrow").read_text() == "x"
    (tmp_path / "e").mkdir()
    (tmp_path / "e/spm.model").write_text("my own")
    assert prepare("-i", corpus, "-o", tmp_path / "e", "--overwrite") == 2
    assert "is another vocabulary" in capsys.readouterr().err
    assert (tmp_path / "e/spm.model").read_text() == "my own"


def test_two_commands_do_not_prepare_one_folder(prepare, tmp_path: Path, corpus: Path, monkeypatch):
    monkeypatch.setattr("restart.LOCK_ATTEMPTS", 1)
    with locked(tmp_path / "d"):
        assert prepare("-i", corpus, "-o", tmp_path / "d") == 2
    assert prepare("-i", corpus, "-o", tmp_path / "d") == 0


LINE = b'{"text": "the king of the river"}\n'


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({}, ["-i", "gone.txt"], "gone.txt: no such file"),
        ({"a.txt": b""}, ["-i", "a.txt"], "a.txt is empty"),
        ({"a.jsonl.gz": gzip.compress(LINE * 999)[:-9]}, ["-i", "a.jsonl.gz"], "cut short"),
        ({"a.jsonl": LINE + b"{}"}, ["-i", "a.jsonl"], "a.jsonl, line 2: must be an object"),
        ({"a.jsonl": LINE}, ["-i", "a.jsonl"], "train split would get .* tokens, not one full"),
        (
            {"a.jsonl": LINE * 50},
            ["-i", "a.jsonl", "--valid_fraction", 1e-9],
            "valid split .* no tok",
        ),
        (
            {"a.txt": LINE * 99},
            ["-i", "a.txt"],
            "valid split .* no document. a.txt counts as one document.*--documents blank_line or",
        ),
        ({"a.jsonl": LINE}, ["-i", "a.jsonl", "--documents", "line"], "no input is a .txt file"),
        ({"a.jsonl": LINE}, ["-i", "a.jsonl", "a.jsonl"], "a.jsonl must be given once"),
        ({"a.jsonl": LINE}, ["-i", "a.jsonl", "--valid_input", "a.jsonl"], "must be given once"),
        ({"a.jsonl": LINE, "d": b"x"}, ["-i", "a.jsonl"], "exists|directory"),
        ({"a.jsonl": LINE}, ["-i", "a.jsonl", "--vocab", "gone"], "no vocabulary"),
        ({"a.jsonl": LINE}, ["-i", "a.jsonl", "--vocab", "a.jsonl"], "not a sentencepiece model"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    prepare, tmp_path: Path, monkeypatch, capsys, files, flags, message: str
):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert prepare(*flags, "-o", "d") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert re.search(message, error)


def test_a_missing_gensim_is_named(prepare, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gensim.corpora.wikicorpus", None)
    (tmp_path / "a.xml").write_bytes(dump(("0", "", "text")))
    assert prepare("-i", tmp_path / "a.xml", "-o", tmp_path / "d") == 2
    assert "pip install gensim" in capsys.readouterr().err


def test_an_error_in_a_worker_is_one_line_too(prepare, tmp_path: Path, capsys):
    (tmp_path / "a.jsonl").write_bytes(LINE * 999 + b"{")
    assert prepare("-i", tmp_path / "a.jsonl", "-o", tmp_path / "d", workers=2) == 2
    error = capsys.readouterr().err
    assert "a.jsonl, line 1000: not JSON" in error
    assert len(error.splitlines()) == 1


def test_a_killed_worker_is_an_error_not_a_wait(
    prepare, tmp_path: Path, corpus, monkeypatch, capsys
):
    monkeypatch.setattr("encoding.parse", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    assert prepare("-i", corpus, "-o", tmp_path / "d", workers=2) == 2
    assert "a worker was killed" in capsys.readouterr().err


def test_input_is_read_no_faster_than_it_is_encoded(vocab_file: Path, monkeypatch):
    """Memory stays bounded: few chunks are on their way at any time."""
    read = done = 0

    def chunks() -> Iterator[Chunk]:
        nonlocal read
        for number in range(100):
            read += 1
            yield Chunk("train", [(0, number)], [Record("a.txt", number, True, "the king")])

    for chunk, _, _ in encode_chunks(chunks(), vocab=vocab_file, text_field="", workers=2):
        assert chunk.places == [(0, done)]  # in order
        done += 1
        assert read - done <= 2 * 2 + AHEAD
    assert read == done == 100


@pytest.fixture(scope="module")
def byte_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary that spells unknown characters in bytes."""
    path = tmp_path_factory.mktemp("vocab") / "spm.model"
    path.write_bytes(train_tokenizer([*sentences(300), "x", "\u4e2d"], vocab_size=320))
    return path


@pytest.mark.parametrize("filling", ["x", "\0", "\u4e2d", "\U0001f600"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_megabytes_without_a_space_are_encoded_in_pieces(
    prepare, tmp_path: Path, byte_vocab: Path, filling: str, name: str
):
    size = 10_000_000 if (filling, name) == ("x", "a.txt") else 1_000_000
    text = filling * (size // len(filling.encode()))
    content = json.dumps({"text": text}) if name == "a.jsonl" else text
    (tmp_path / name).write_text(content, encoding="utf-8")
    flags = ("-i", tmp_path / name, "-o", tmp_path / "d", "--valid_fraction", 0)
    started = time.monotonic()
    assert prepare(*flags, "--max_seq_length", 50_000, vocab=byte_vocab) == 0
    assert time.monotonic() - started < 20
    ids = np.concatenate(read_rows(tmp_path / "d", "train"))
    processor = SentencePieceProcessor(model_file=str(byte_vocab))
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    assert np.array_equal(ids, np.concatenate(processor.encode(pieces)))
    assert len(ids) >= len(text)


def test_lines_show_progress_where_there_is_no_terminal(
    prepare, tmp_path, corpus, monkeypatch, capsys
):
    monkeypatch.setattr("meter.SECONDS_BETWEEN_LINES", 0)
    assert prepare("-i", corpus, "-o", tmp_path / "d") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert lines[-1].startswith("100%|")
    size = f"{corpus.stat().st_size / 1000:.1f}k"
    assert f"{size}/{size}" in lines[-1]


@pytest.mark.parametrize("fraction", [0.01, 0.08, 0.3])
def test_validation_gets_its_share_of_any_hundred_documents(fraction: float):
    for file in range(20):
        chosen = [
            choose_split(("train", "valid"), (file, n), seed=5, fraction=fraction) == "valid"
            for n in range(1000)
        ]
        for start in range(0, 1000, 100):
            assert abs(sum(chosen[start : start + 100]) - 100 * fraction) <= 100 * fraction / 3 + 2
    other = [choose_split(("train", "valid"), (0, n), seed=6, fraction=0.3) for n in range(1000)]
    assert other != [
        choose_split(("train", "valid"), (0, n), seed=5, fraction=0.3) for n in range(1000)
    ]


def test_a_vocabulary_that_a_run_would_refuse_is_refused_before_the_corpus_is_read(
    prepare, vocab_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    def refused(vocab: Path) -> str:
        assert prepare("-i", tmp_path / "not_read.txt", "-o", tmp_path / "out", vocab=vocab) == 2
        return capsys.readouterr().err

    lacking = tmp_path / "words.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(vocab_file.read_bytes())
    model.pieces[100].type = model.pieces[100].USER_DEFINED
    lacking.write_bytes(model.SerializeToString())
    assert "must be a unigram vocabulary" in refused(lacking)

    vocab = tmp_path / "spm.model"
    vocab.write_bytes(vocab_file.read_bytes())
    added = tmp_path / "added_tokens.json"
    for words, message in (
        ({"[MASK]": 300}, "not_read.txt"),  # as Hugging Face writes it
        ({"[MASK]": 300, "kubernetes": 301}, "adds 'kubernetes' (id 301)"),
        ({"kubernetes": "first"}, "as Hugging Face writes them"),
    ):
        added.write_text(json.dumps(words))
        assert message in refused(vocab)
    added.unlink()
    for name, words in (
        ("tokenizer.json", {"added_tokens": [{"id": 301, "content": "kubernetes"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"301": {"content": "kubernetes"}}}),
    ):
        (tmp_path / name).write_text(json.dumps(words))
        assert f"{name} adds 'kubernetes' (id 301)" in refused(vocab)
        (tmp_path / name).unlink()
