"""Time and memory from opening prepared data to the first batch, for few rows and for many.

    python benchmarks/data_startup.py
    python benchmarks/data_startup.py --vocab_file PATH/spm.model  # with a vocabulary of real size

Every measurement is a fresh process, and the imports of Python are not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import sentencepiece

from ds_deberta.data import (
    DebertaTokenizer,
    Manifest,
    NGramMasker,
    ShardWriter,
    SplitInfo,
    TokenizerInfo,
    load_tokenizer,
)
from ds_deberta.data.loader import build_train_batches

MAX_SEQ_LENGTH = 32
BATCH_SIZE = 64


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab_file", type=Path, help="default: a tiny one, trained here")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    print("| rows | data | seconds to the first batch | peak memory | of it not mapped data |")
    print("|---|---|---|---|---|")
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), num_rows, arguments.vocab_file)
            size = sum(path.stat().st_size for path in Path(folder, "train").iterdir())
            command = [sys.executable, __file__, "--measure", folder]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(arguments.repeats)]
        names = ("seconds", "peak", "private")
        seconds, peak, private = np.median([[run[name] for name in names] for run in runs], axis=0)
        print(
            f"| {num_rows:,} | {size / 2**20:.1f} MiB | {seconds:.3f} | "
            f"+{peak / 2**20:.1f} MiB | +{private / 2**20:.1f} MiB |"
        )


def measure(data_dir: Path) -> dict[str, float]:
    """Open the data and make one batch; return the seconds and the growth of memory in bytes."""
    before, start = memory(), time.perf_counter()
    tokenizer = load_tokenizer(data_dir)
    masker = NGramMasker(
        special=tokenizer.special,
        is_word_start=tokenizer.is_word_start,
        num_tokens=tokenizer.num_tokens,
        max_seq_length=MAX_SEQ_LENGTH,
        max_ngram=3,
    )
    batches = build_train_batches(
        data_dir=data_dir,
        tokenizer=tokenizer,
        masker=masker,
        micro_batch_size=BATCH_SIZE,
        accumulation_steps=1,
        seed=0,
    )
    next(batches)
    seconds, after = time.perf_counter() - start, memory()
    return {
        "seconds": seconds,
        "peak": after["VmHWM"] - before["VmRSS"],
        "private": after["RssAnon"] - before["RssAnon"],
    }


def memory() -> dict[str, int]:
    """Return this process's memory in bytes, by Linux's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")
    }


def write_data(data_dir: Path, num_rows: int, vocab_file: Path | None) -> None:
    """Write a data folder with one split of random rows."""
    (data_dir / "spm.model").write_bytes(
        vocab_file.read_bytes() if vocab_file else train_vocabulary()
    )
    tokenizer = DebertaTokenizer(data_dir / "spm.model")
    rng = np.random.default_rng(0)
    content = rng.integers(4, tokenizer.special.mask, size=(1000, MAX_SEQ_LENGTH - 2))
    writer = ShardWriter(data_dir / "train")
    for number in range(num_rows):
        writer.write(content[number % len(content)])
    split = SplitInfo(
        rows=num_rows, tokens=num_rows * content.shape[1], documents=1, shards=tuple(writer.close())
    )
    Manifest(
        tokenizer=TokenizerInfo(
            file="spm.model", sha256=tokenizer.sha256, num_tokens=tokenizer.num_tokens
        ),
        max_seq_length=MAX_SEQ_LENGTH,
        keep_documents_apart=False,
        splits={"train": split},
    ).save(data_dir)


def train_vocabulary() -> bytes:
    """Make the smallest vocabulary that the tokenizer accepts."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=random_lines(),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
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
    return model.getvalue()


def random_lines() -> Iterator[str]:
    """Return text of random words."""
    letters = np.random.default_rng(0).choice(list("abcdefghij"), size=(300, 8, 4))
    return (" ".join("".join(word) for word in line) for line in letters)


if __name__ == "__main__":
    main()
