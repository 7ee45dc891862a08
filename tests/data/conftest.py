from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from ds_deberta.data import (
    DebertaTokenizer,
    Manifest,
    NGramMasker,
    ShardWriter,
    SpecialTokens,
    SplitInfo,
    TokenizerInfo,
)

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog (who is lazy) sleeps.",
    "Pre-training hides some tokens of a text; the model must say which ones they were.",
    "One generator fills the gaps: one discriminator finds out which tokens it replaced!",
    "Unbelievable disentanglement, unbelievably disentangled; relatively relative positions.",
]


def _train_vocabulary(path: Path, **options) -> Path:
    """A small unigram vocabulary with DeBERTa's first pieces; `options` override."""
    model = BytesIO()
    settings = {
        "vocab_size": 120,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "pad_piece": "[PAD]",
        "bos_piece": "[CLS]",
        "eos_piece": "[SEP]",
        "unk_piece": "[UNK]",
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 5), model_writer=model, **settings | options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def train_vocabulary():
    return _train_vocabulary


@pytest.fixture(scope="session")
def text() -> list[str]:
    return TEXT


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory) -> Path:
    return _train_vocabulary(tmp_path_factory.mktemp("vocabulary") / "spm.model")


@pytest.fixture(scope="session")
def tokenizer(vocab_file) -> DebertaTokenizer:
    return DebertaTokenizer(vocab_file)


@dataclass(frozen=True)
class Data:
    """A data folder, and its rows as they were written."""

    folder: Path
    manifest: Manifest
    rows: dict[str, list[np.ndarray]]


def _write_data(
    folder: Path, tokenizer: DebertaTokenizer, num_rows: dict[str, int], *, packed: bool = False
) -> Data:
    """Rows of 1 to 30 random ordinary ids, in shards of 10 rows; packed: with [SEP] [CLS]."""
    rng = np.random.default_rng(0)
    rows, splits = {}, {}
    for split, count in num_rows.items():
        writer = ShardWriter(folder / split, rows_per_shard=10)
        rows[split] = [
            rng.integers(4, tokenizer.special.mask, size=rng.integers(1, 31), dtype=np.int32)
            for _ in range(count)
        ]
        for row in rows[split]:
            if packed:
                for at in range(rng.integers(1, 12), len(row) - 2, 9):
                    row[at : at + 2] = tokenizer.special.sep, tokenizer.special.cls
            writer.write(row)
        tokens = sum(len(row) for row in rows[split])
        splits[split] = SplitInfo(
            rows=count, tokens=tokens, documents=1, shards=tuple(writer.close())
        )
    folder.joinpath("spm.model").write_bytes(tokenizer.vocab_file.read_bytes())
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            file="spm.model", sha256=tokenizer.sha256, num_tokens=tokenizer.num_tokens
        ),
        max_seq_length=32,
        keep_documents_apart=False,
        packed=packed,
        splits=splits,
    )
    manifest.save(folder)
    return Data(folder, manifest, rows)


@pytest.fixture(scope="session")
def write_data():
    return _write_data


@pytest.fixture
def data_dir():
    """Not here: with this folder's vocabulary, all later tests would get it, too. Use `data`."""
    pytest.fail("tests/data has a vocabulary of its own: use the fixture `data`")


@pytest.fixture
def data(tmp_path, tokenizer) -> Data:
    return _write_data(tmp_path, tokenizer, {"train": 41, "valid": 23})


@pytest.fixture
def masker(tokenizer) -> NGramMasker:
    return NGramMasker(
        special=tokenizer.special,
        is_word_start=tokenizer.is_word_start,
        num_tokens=tokenizer.num_tokens,
        max_seq_length=32,
        max_ngram=3,
    )


@pytest.fixture
def special() -> SpecialTokens:
    """[MASK] in the middle of the vocabulary, where nothing may take it for granted."""
    return SpecialTokens(pad=0, cls=1, sep=2, unk=3, mask=50)
