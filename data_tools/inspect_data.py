"""Look at prepared data: counts, row lengths, a few rows as text, and what a model would see.

python data_tools/inspect_data.py data/corpus --verify
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from ds_deberta.data.masking import NGramMasker
from ds_deberta.data.shards import Manifest, ShardDataset, load_tokenizer
from ds_deberta.data.tokenizer import DebertaTokenizer

BINS = 8
SAMPLED_ROWS = 100_000  # for the histogram and the entropy
SHOWN_IDS = 96  # of a row, as text


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data_dir", type=Path)
    add("--rows", type=int, default=3, help="rows to show as text")
    add("--seed", type=int, default=0, help="of the masks")
    add("--verify", action="store_true", help="read all of it and compare the checksums")
    args = parser.parse_args()
    try:
        inspect(args.data_dir, rows=args.rows, seed=args.seed, verify=args.verify)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(data_dir: Path, *, rows: int, seed: int, verify: bool) -> None:
    """Print the report."""
    manifest = Manifest.load(data_dir)
    tokenizer = load_tokenizer(data_dir)
    special = tokenizer.special
    how = "kept apart" if manifest.keep_documents_apart else "joined"
    print(
        f"{data_dir}: rows of at most {manifest.max_seq_length} with [CLS] and [SEP], "
        f"documents {'packed, apart from each other' if manifest.packed else how}, "
        f"{tokenizer.num_tokens:,} ids ({tokenizer.vocab_size:,} embedding rows)"
    )
    datasets = {split: ShardDataset(data_dir, split, manifest) for split in manifest.splits}
    for split, info in manifest.splits.items():
        print(
            f"\n{split}: {info.rows:,} rows, {info.tokens:,} tokens, {info.documents:,} documents, "
            f"{len(info.shards):,} shards"
        )
        if info.rows:
            rows_read = sample_rows(datasets[split])
            show_lengths(rows_read, manifest.max_seq_length - 2)
            if manifest.packed:
                per_row = 1 + np.mean([np.count_nonzero(row == special.cls) for row in rows_read])
                print(f"  documents, or pieces of long ones, per row: {per_row:.1f}")
            entropy = unigram_entropy(rows_read, without=(special.sep, special.cls))
            print(
                f"  unigram cross-entropy: {entropy:.2f} nats (what a model "
                "that ignores the context can reach)"
            )
    if len(train := datasets["train"]):
        for row in np.linspace(0, len(train) - 1, min(rows, len(train)), dtype=int):
            print(f"\ntrain row {row}: {tokenizer.decode(train[row][:SHOWN_IDS])}")
        show_masks(train[len(train) // 2], tokenizer, manifest.max_seq_length, seed)
    if verify:
        for dataset in datasets.values():
            dataset.verify()
        print("\nall checksums are right")


def sample_rows(dataset: ShardDataset) -> list[np.ndarray]:
    """All rows, or evenly spaced ones of a large split."""
    sample = np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLED_ROWS), dtype=int)
    return [dataset[row] for row in sample]


def unigram_entropy(rows: list[np.ndarray], *, without: tuple[int, ...] = ()) -> float:
    """Entropy of the ids' own frequencies, in nats, `without` those that nobody predicts."""
    counts = np.bincount(np.concatenate(rows), minlength=1 + max(without, default=0))
    counts[list(without)] = 0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def show_lengths(rows: list[np.ndarray], longest: int) -> None:
    """Print a histogram of the row lengths."""
    lengths = [len(row) for row in rows]
    edges = np.linspace(0, longest, min(BINS, longest) + 1).astype(int) + 1
    counts, _ = np.histogram(lengths, bins=edges - 0.5)
    for count, low, high in zip(counts, edges, edges[1:] - 1, strict=False):
        share = count / len(lengths)
        print(f"  {f'{low}-{high}':>11} ids: {share:7.2%} {'#' * round(40 * share)}")


def show_masks(
    row: np.ndarray, tokenizer: DebertaTokenizer, max_seq_length: int, seed: int
) -> None:
    """Print one row as replaced token detection and as masked language modeling mask it."""
    special = tokenizer.special
    ids = np.concatenate([[special.cls], row, [special.sep]])
    for name, rule in {
        "RTD (all predicted tokens masked)": {"mask_token_prob": 1.0, "keep_prob": 0.0},
        "MLM (runs of up to 3 words; 80 % masked, 10 % kept, 10 % random)": {"max_ngram": 3},
    }.items():
        masker = NGramMasker(
            special=special,
            is_word_start=tokenizer.is_word_start,
            num_tokens=tokenizer.num_tokens,
            max_seq_length=max_seq_length,
            **rule,
        )
        masked, positions, labels = masker(ids, np.random.default_rng(seed))
        print(f"\n{name}, {len(positions)} of {len(ids)}: " + tokenizer.decode(masked[:SHOWN_IDS]))
        print(f"to predict: {' '.join(tokenizer.pieces(labels[positions < SHOWN_IDS]))}")


if __name__ == "__main__":
    sys.exit(main())
