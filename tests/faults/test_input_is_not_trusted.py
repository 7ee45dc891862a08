"""Text, data folders, flags and settings of any kind: a right result or a clear error.

`make test` tries a few cases of each kind, always the same ones; `make test-faults` ten thousand.
"""

import contextlib
import io
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding import encode_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import parse, read_records
from train_tokenizer import train_tokenizer

from ds_deberta.config import parse as parse_flags
from ds_deberta.data import DebertaTokenizer, Manifest, ShardDataset
from ds_deberta.engine import DeepSpeedFacts, load_ds_config
from ds_deberta.launch import check_options, find_node
from ds_deberta.metrics import _drop_entries_after
from ds_deberta.model import load_model_config
from ds_deberta.optim import OptimConfig
from tests.conftest import sentences
from tests.launch import ROOT

KINDS_OF_CASES = 8
LOOK_ALIKES = ("[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "<0x41>", "\u2581", "<unk>", "</s>")
PARTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(LOOK_ALIKES),
    st.sampled_from(["\r\n", "\r", "\n", "\x85", "\u2028", "\0", "\x1b[2J", "\ufeff", "\u200d"]),
    st.sampled_from(["e\u0301\u0323", "\U0001f468\u200d\U0001f469", "\ufffd", "\u202e", "x" * 99]),
    st.text(st.characters(categories=["Mn", "Me", "Cf", "Cc", "Co", "So", "Zs"]), max_size=9),
)
TEXTS = st.lists(PARTS, max_size=8).map("".join)
WITH_SURROGATES = st.text(st.characters(categories=["Cs", "Lu", "Nd"]), min_size=1, max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.fixture(params=[25, pytest.param(10_000 // KINDS_OF_CASES, marks=pytest.mark.slow)])
def fuzz(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call a function with many cases of a strategy."""

    def run(strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        count = 0

        @settings(max_examples=request.param, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def each(case: Any) -> None:
            nonlocal count
            count += 1
            check(case)

        each()
        print(f"{request.node.originalname}: {count} cases")

    return run


@pytest.fixture(scope="module")
def byte_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary that spells unknown characters in bytes, as the one that users train."""
    path = tmp_path_factory.mktemp("vocab") / "spm.model"
    path.write_bytes(train_tokenizer([*sentences(300), "0123456789"], vocab_size=340))
    return path


def normalised(text: str, tokenizer: DebertaTokenizer) -> str:
    """What sentencepiece makes of a text before it cuts it."""
    return tokenizer._processor.normalize(text).replace("\u2581", " ").strip()


def test_any_text_comes_back_from_its_ids(byte_vocab, fuzz):
    tokenizer = DebertaTokenizer(byte_vocab)
    special = set(tokenizer.special.ids())

    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.num_tokens for i in ids)
        assert not special & set(ids), "text may not spell a special token"
        assert tokenizer.decode(ids).strip() == normalised(text, tokenizer)
        assert tokenizer.encode_batch([text]) == [ids]

    fuzz(TEXTS, check)


def test_normalisation_loses_nothing_but_what_nfkc_and_control_characters_are(byte_vocab):
    """`normalised` above is sentencepiece's own: letters must still be there."""
    tokenizer = DebertaTokenizer(byte_vocab)
    for text in ("The king", "[MASK] me", "\u4e2d\u6587", "e\u0301", "\U0001f600", "\ufb01x"):
        expected = unicodedata.normalize("NFKC", text)
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_half_characters_are_refused(byte_vocab, fuzz):
    tokenizer = DebertaTokenizer(byte_vocab)

    def check(text: str) -> None:
        line = json.dumps({"text": text}).encode()  # \ud800 and the like
        text = json.loads(line)["text"]  # two halves side by side are a whole
        try:
            text.encode()
        except UnicodeEncodeError:
            with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*surrogate"):
                read("a.jsonl", line)
        else:
            assert tokenizer.decode(tokenizer.encode(text)).strip() == normalised(text, tokenizer)

    fuzz(WITH_SURROGATES, check)


class NamedBytes(io.BytesIO):
    """An open file of that name."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.name = name


def read(name: str, content: bytes) -> list[str]:
    records = read_records(NamedBytes(name, content), text_field="text")
    return [parse(record, text_field="text") for record in records]


def test_files_of_any_bytes_are_read_whole_or_refused(byte_vocab, fuzz):
    """Each kind of file; what is read is all that is there."""
    names = ["a.txt", "a.raw", "a.jsonl", "a.xml", "a.parquet", "a.txt.gz", "a.jsonl.bz2"]
    content = st.binary(max_size=60) | TEXTS.map(str.encode)
    content |= st.dictionaries(st.sampled_from(["text", "x"]), JSON).map(
        lambda fields: json.dumps(fields).encode()
    )

    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        try:
            texts = read(name, content)
        except ValueError as error:
            assert name in str(error)
            return
        if name in ("a.txt", "a.raw"):
            assert "".join(texts) == content.decode("utf-8-sig")
        elif name == "a.jsonl":
            lines = content.decode("utf-8-sig").split("\n")
            lines = lines[:-1] if lines[-1] == "" else lines
            assert texts == ["" if not x.strip() else json.loads(x)["text"] for x in lines]

    fuzz(st.tuples(st.sampled_from(names), content), check)


def test_any_text_goes_through_prepare_datas_readers(byte_vocab, fuzz):
    """From a file to ids and back; JSON lines, plain text."""
    tokenizer = DebertaTokenizer(byte_vocab)

    def check(text: str) -> None:
        for name, content in (
            ("a.jsonl", json.dumps({"text": text}).encode()),
            ("a.txt", text.encode()),
        ):
            if not content:
                with pytest.raises(ValueError, match="holds no documents"):
                    read(name, content)
                continue
            records = list(read_records(NamedBytes(name, content), text_field="text"))
            ids, lengths = encode_records(records, vocab=byte_vocab, text_field="text")
            expected = text if name == "a.jsonl" else content.decode("utf-8-sig")
            assert ids.tolist() == tokenizer.encode(expected)
            assert sum(lengths) == len(ids)

    fuzz(TEXTS, check)


@pytest.mark.slow
@pytest.mark.parametrize("filling", ["x", "\0", "\u0301", "\U0001f468\u200d", "[MASK]"])
def test_ten_megabytes_without_a_space_come_back(byte_vocab, filling):
    tokenizer = DebertaTokenizer(byte_vocab)
    text = filling * (10_000_000 // len(filling.encode()))
    records = list(read_records(NamedBytes("a.txt", text.encode()), text_field="text"))
    assert "".join(parse(record, text_field="text") for record in records) == text
    ids, _ = encode_records(records, vocab=byte_vocab, text_field="text")
    assert not set(tokenizer.special.ids()) & set(np.unique(ids).tolist())


def flag_values() -> st.SearchStrategy[str]:
    numbers = st.sampled_from(
        ["0", "-1", "1e400", "nan", "inf", "-inf", "1e-3", "3.5", "1_0", "0x1"]
    )
    words = st.sampled_from(
        ["true", "none", "", " ", "c2p|p2c", "rtd", "mlm", "\0", "\ud800", "--"]
    )
    return numbers | words | st.text(max_size=6) | st.integers().map(str) | st.floats().map(repr)


def test_any_flags_make_a_valid_configuration_or_a_usage_error(tmp_path, fuzz):
    base = ["--objective", "mlm", "--model", "bert-base", "--output_dir", "x"]
    names = [*json.loads(parse_flags(base).to_json()), "config", "no_such_flag"]
    pair = st.tuples(st.sampled_from(names), flag_values())

    def check(pairs: list[tuple[str, str]]) -> None:
        words = [word for name, value in pairs for word in (f"--{name}", value)]
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            try:
                run = parse_flags([*base, *words])
            except SystemExit as end:
                assert end.code == 2
                assert printed.getvalue().strip()
                return
        file = tmp_path / "again.json"
        file.write_text(run.to_json())
        assert parse_flags(["--config", str(file)]) == run

    fuzz(st.lists(pair, min_size=1, max_size=3), check)


def test_any_settings_file_makes_a_valid_configuration_or_a_usage_error(tmp_path, fuzz):
    base = ["--objective", "mlm", "--model", "bert-base", "--output_dir", "x"]
    names = st.sampled_from([*json.loads(parse_flags(base).to_json())])
    file = tmp_path / "config.json"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            try:
                parse_flags([*base, "--config", str(file)])
            except SystemExit as end:
                assert end.code == 2
                assert printed.getvalue().strip()

    objects = st.dictionaries(names, JSON, max_size=3) | JSON
    fuzz(objects.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=30), check)


def test_any_deepspeed_configuration_is_taken_or_refused(tmp_path, fuzz):
    """Every shipped one with a part replaced by anything."""
    facts = DeepSpeedFacts(
        train_batch_size=64,
        micro_batch_size=8,
        hidden_size=256,
        lr=1e-3,
        optim=OptimConfig(learning_rate=1e-3),
    )
    shipped = [json.loads(x.read_text()) for x in sorted((ROOT / "ds_configs").glob("*.json"))]
    keys = sorted({key for config in shipped for key in config} | {"optimizer", "torch_autocast"})
    inner = st.sampled_from(["enabled", "stage", "dtype", "type", "params", "lr"])
    values = JSON | st.dictionaries(inner, JSON | st.dictionaries(inner, JSON)) | st.just("auto")
    file = tmp_path / "ds.json"

    def check(case: tuple[dict[str, Any], str, Any]) -> None:
        config, key, value = case
        file.write_text(json.dumps(config | {key: value}))
        with contextlib.suppress(ValueError):
            load_ds_config(file, facts)

    fuzz(st.tuples(st.sampled_from(shipped), st.sampled_from(keys), values), check)


def test_any_model_configuration_is_taken_or_refused(tmp_path, tiny_config, fuzz):
    names = st.sampled_from(sorted(tiny_config.to_dict()))
    file = tmp_path / "config.json"

    def check(case: tuple[str, Any]) -> None:
        file.write_text(json.dumps(tiny_config.to_dict() | dict([case])))
        with contextlib.suppress(ValueError):
            load_model_config(str(file))

    fuzz(st.tuples(names, JSON), check)


DAMAGES = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "zero", "replace"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=8),
)


def damage(content: bytes, how: str, where: float, what: bytes) -> bytes:
    at = int(where * len(content))
    return {
        "flip": lambda: content[:at] + bytes([content[at] ^ 1 << what[0] % 8]) + content[at + 1 :],
        "cut": lambda: content[:at],
        "insert": lambda: content[:at] + what + content[at:],
        "zero": lambda: content[:at] + bytes(len(content) - at),
        "replace": lambda: what,
    }[how]()


def test_a_damaged_manifest_is_refused_or_says_the_same(data_dir, tmp_path, fuzz):
    whole = (data_dir / "manifest.json").read_bytes()
    expected = Manifest.load(data_dir)

    def check(case: tuple[str, float, bytes]) -> None:
        (tmp_path / "manifest.json").write_bytes(damage(whole, *case))
        try:
            assert Manifest.load(tmp_path) == expected
        except ValueError as error:
            assert "manifest.json" in str(error)

    fuzz(DAMAGES, check)


def test_a_damaged_shard_is_refused_or_reads_the_same(data_dir, tmp_path, fuzz):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    file = folder / "train/00001.arrow"
    whole = file.read_bytes()
    manifest = Manifest.load(folder)

    def check(case: tuple[str, float, bytes]) -> None:
        content = damage(whole, *case)
        file.unlink()  # another file: the old one may be mapped
        file.write_bytes(content)
        try:
            dataset = ShardDataset(folder, "train", manifest)
            dataset.verify()
        except (ValueError, FileNotFoundError) as error:
            assert "00001.arrow" in str(error)
        else:
            assert content == whole

    fuzz(DAMAGES, check)


def test_a_damaged_vocabulary_is_refused_or_loads(vocab_file, tmp_path, fuzz):
    """--vocab of the data tools; in a data folder its hash decides."""
    whole = vocab_file.read_bytes()
    file = tmp_path / "spm.model"

    def check(case: tuple[str, float, bytes]) -> None:
        file.write_bytes(damage(whole, *case))
        try:
            tokenizer = DebertaTokenizer(file)
        except ValueError as error:
            assert "spm.model" in str(error)
        else:
            assert all(0 <= i < tokenizer.num_tokens for i in tokenizer.encode("The king."))

    fuzz(DAMAGES, check)


def test_damaged_metrics_are_refused_or_kept(tmp_path, fuzz):
    lines = [json.dumps({"step": step, "split": "train", "loss": 0.5}) for step in range(1, 9)]
    whole = ("\n".join(lines) + "\n").encode()
    file = tmp_path / "metrics.jsonl"

    def check(case: tuple[str, float, bytes]) -> None:
        content = damage(whole, *case)
        file.write_bytes(content)
        try:
            _drop_entries_after(file, 5)
        except ValueError as error:
            assert "metrics.jsonl" in str(error)
            assert file.read_bytes() == content
        else:
            kept = [json.loads(line)["step"] for line in file.read_bytes().splitlines()]
            assert all(step <= 5 for step in kept)

    fuzz(DAMAGES, check)


def test_any_launcher_environment_and_hostfile_is_taken_or_refused(tmp_path, monkeypatch, fuzz):
    monkeypatch.chdir(tmp_path)
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    names += ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"]
    names += ["SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_LOCALID"]
    values = (
        st.integers(-1, 3).map(str) | st.text(max_size=5) | st.sampled_from(["\u00b2", "2(x2)"])
    )

    def check(case: tuple[dict[str, str], bytes]) -> None:
        variables, content = case
        (tmp_path / "hosts").write_bytes(content)
        (tmp_path / ".deepspeed_env").write_bytes(content)
        with contextlib.suppress(ValueError):
            place = find_node(variables)
            assert 0 <= place.rank < place.world_size
            check_options(["--hostfile", "hosts"], place, None, ["run_pretrain.py"])

    content = st.binary(max_size=20) | st.sampled_from([b"A=1\n", b"A=1\n\n"])
    fuzz(st.tuples(st.dictionaries(st.sampled_from(names), values), content), check)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)
