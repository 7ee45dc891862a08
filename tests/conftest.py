"""Small things that tests share: a vocabulary, prepared data, a tiny architecture."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from ds_deberta.data import DebertaTokenizer, Manifest, ShardWriter, SplitInfo, TokenizerInfo
from ds_deberta.model import DebertaConfig

torch.set_num_threads(1)  # several times faster where others share the cores


def sentences(count: int, seed: int = 0) -> list[str]:
    """English-looking lines over a small set of words."""
    rng = random.Random(seed)
    words = ["the", "a", "king", "river", "old", "new", "city", "runs", "builds", "of", "and", "in"]
    words += ["".join(rng.choices("abcdefghiklmnoprstu", k=rng.randint(2, 8))) for _ in range(800)]
    return [" ".join(rng.choices(words, k=rng.randint(6, 20))) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeBERTa vocabulary of 300 pieces."""
    folder = tmp_path_factory.mktemp("vocab")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(2000)),
        model_prefix=str(folder / "spm"),
        vocab_size=300,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    return folder / "spm.model"


@pytest.fixture(scope="session")
def tokenizer(vocab_file: Path) -> DebertaTokenizer:
    return DebertaTokenizer(vocab_file)


@pytest.fixture(scope="session")
def data_dir(vocab_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data at length 32: 200 train rows and 24 valid rows, some of them short."""
    return write_data(tmp_path_factory.mktemp("data"), vocab_file)


@pytest.fixture(scope="session")
def packed_data_dir(vocab_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such data with two or three documents in each row."""
    return write_data(tmp_path_factory.mktemp("packed"), vocab_file, documents_end_at=(4, 17))


@pytest.fixture(scope="session")
def short_data_dir(vocab_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such data at length 24."""
    return write_data(tmp_path_factory.mktemp("short"), vocab_file, max_seq_length=24)


def write_data(
    folder: Path,
    vocab_file: Path,
    *,
    max_seq_length: int = 32,
    documents_end_at: Sequence[int] = (),
    valid_rows: int = 24,
) -> Path:
    """Make a data folder, packed if `documents_end_at` says where [SEP] [CLS] stands in a row."""
    (folder / "spm.model").write_bytes(vocab_file.read_bytes())
    tokenizer = DebertaTokenizer(folder / "spm.model")
    splits = {}
    for split, rows, seed in (("train", 200, 1), ("valid", valid_rows, 2)):
        ids = np.array([i for line in sentences(600, seed) for i in tokenizer.encode(line)])
        lengths = np.where(np.arange(rows) % 7 == 0, 11, max_seq_length - 2)
        writer = ShardWriter(folder / split, rows_per_shard=64)
        for row in np.split(ids, np.cumsum(lengths))[:rows]:
            for end in (end for end in documents_end_at if end < len(row)):
                row[end : end + 2] = [tokenizer.special.sep, tokenizer.special.cls]
            writer.write(row)
        splits[split] = SplitInfo(
            rows=rows, tokens=int(lengths.sum()), documents=600, shards=tuple(writer.close())
        )
    Manifest(
        tokenizer=TokenizerInfo(
            file="spm.model", sha256=tokenizer.sha256, num_tokens=tokenizer.num_tokens
        ),
        max_seq_length=max_seq_length,
        keep_documents_apart=False,
        packed=len(documents_end_at) > 0,
        splits=splits,
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tokenizer: DebertaTokenizer) -> DebertaConfig:
    """2 layers, hidden 32, dropout on."""
    return DebertaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        position_buckets=8,
    )


@pytest.fixture(scope="session")
def tiny_model_file(tiny_config: DebertaConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny architecture as a config.json, for `--model`."""
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(tiny_config.to_dict()))
    return file
