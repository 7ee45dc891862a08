"""Batches of masked rows, the same for any number of ranks and worker processes."""

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_deberta.data.masking import NGramMasker
from ds_deberta.data.sampler import (
    EMPTY,
    PaddedSequentialSampler,
    ResumableSampler,
    SkippedSamples,
)
from ds_deberta.data.shards import Manifest, ShardDataset
from ds_deberta.data.tokenizer import DebertaTokenizer
from ds_deberta.distributed import end_with_parent

IGNORE_INDEX = -100
VALIDATION_STREAM = 0x76616C6964  # keeps validation masks apart from the training masks of a seed


@dataclass(frozen=True)
class Batch:
    """Rows of a fixed length L with up to P predicted positions each.

    Shapes: B rows, L tokens, P predicted positions.
    """

    input_ids: Tensor
    """[B, L] int64, after masking, padded with [PAD]."""
    documents: Tensor
    """[B, L] bool, True where a real token. Of packed data int32: the number of the token's
    document in its row, from 1; 0 for padding."""
    predicted_positions: Tensor
    """[B, P] int64, ascending; 0 where unused."""
    labels: Tensor
    """[B, P] int64 original ids; IGNORE_INDEX where unused."""
    uniforms: Tensor
    """[B, P] float64 in [0, 1): chance for whoever samples at a predicted position."""
    sample_numbers: Tensor
    """[B] int64; -1 for the empty rows that fill a validation pass up."""

    @property
    def attention_mask(self) -> Tensor:
        """[B, L] bool, True where a real token."""
        return self.documents if self.documents.dtype == torch.bool else self.documents != 0

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device, without waiting for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory; DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def original_ids(self) -> Tensor:
        """Return the ids before masking, [B, L]."""
        present = self.input_ids.gather(1, self.predicted_positions)  # [B, P]
        # An unused slot points at [CLS], which is never masked: it writes what is there.
        original = torch.where(self.labels == IGNORE_INDEX, present, self.labels)
        return self.input_ids.scatter(1, self.predicted_positions, original)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(function(getattr(self, field.name)) for field in fields(self)))


class MaskingCollator:
    """Read the rows of a batch and mask them.

    Masks and uniforms come from a generator keyed by the seed and the sample number alone.
    """

    def __init__(self, dataset: ShardDataset, masker: NGramMasker, *, seed: int):
        self.dataset = dataset
        self.masker = masker
        self.seed = seed % 2**64

    def __call__(self, samples: list[tuple[int, int]]) -> Batch:
        """Make a batch of (sample_number, row) pairs; EMPTY ones give rows of padding."""
        special, length = self.masker.special, self.masker.max_seq_length
        shape = (len(samples), self.masker.max_predictions)
        input_ids = np.full((len(samples), length), special.pad)
        predicted_positions = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX)
        uniforms = np.zeros(shape)
        is_packed = self.dataset.is_packed
        documents = np.zeros(input_ids.shape, dtype=np.int32 if is_packed else np.bool_)

        for i, (sample_number, row) in enumerate(samples):
            if (sample_number, row) == EMPTY:
                continue
            rng = np.random.Generator(np.random.Philox(key=sample_number << 64 | self.seed))
            content = self.dataset[row]
            n = len(content) + 2
            ids = input_ids[i, :n]
            ids[0], ids[1:-1], ids[-1] = special.cls, content, special.sep
            documents[i, :n] = (ids == special.cls).cumsum() if is_packed else True
            ids[:], positions, originals = self.masker(ids, rng)
            predicted_positions[i, : len(positions)] = positions
            labels[i, : len(positions)] = originals
            uniforms[i] = rng.random(shape[1])

        return Batch(
            input_ids=torch.from_numpy(input_ids),
            documents=torch.from_numpy(documents),
            predicted_positions=torch.from_numpy(predicted_positions),
            labels=torch.from_numpy(labels),
            uniforms=torch.from_numpy(uniforms),
            sample_numbers=torch.tensor([sample_number for sample_number, _ in samples]),
        )


def build_train_batches(
    *,
    data_dir: Path,
    split: str = "train",
    tokenizer: DebertaTokenizer,
    masker: NGramMasker,
    micro_batch_size: int,
    accumulation_steps: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    consumed_samples: int = 0,
    skipped: SkippedSamples | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """Yield for ever what one rank trains on: for each optimizer step its micro-batches.

    Over all ranks, step s gets the sample numbers s * train_batch_size up to, but not including,
    (s + 1) * train_batch_size, whatever the world size; of those that are not `skipped`.
    """
    dataset = _open_split(data_dir, split, tokenizer, masker)
    sampler = ResumableSampler(
        len(dataset),
        seed=seed,
        rank=rank,
        world_size=world_size,
        consumed_samples=consumed_samples,
        skipped=skipped,
    )
    loader = _build_loader(
        MaskingCollator(dataset, masker, seed=seed),
        sampler,
        batch_size=micro_batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    # iter() starts the workers now, so that the first step finds batches ready.
    return _group(iter(loader), accumulation_steps)


def build_valid_batches(
    *,
    data_dir: Path,
    split: str = "valid",
    tokenizer: DebertaTokenizer,
    masker: NGramMasker,
    micro_batch_size: int,
    seed: int,
    rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[Batch]:
    """Return one rank's share of a validation pass, to be iterated as often as wanted.

    Over all ranks every row comes once, in order, with the same mask in every pass; or, evenly
    spaced, as many as `rows` says. All ranks get the same number of batches of the same size;
    empty rows fill the last ones.
    """
    dataset = _open_split(data_dir, split, tokenizer, masker)
    return _build_loader(
        MaskingCollator(dataset, masker, seed=seed ^ VALIDATION_STREAM),
        PaddedSequentialSampler(
            len(dataset),
            batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            used=rows,
        ),
        batch_size=micro_batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


class _Samples(Dataset[Any]):
    """What DataLoader asks for single items: a sample stands for itself until it is collated."""

    def __getitem__(self, sample: tuple[int, int]) -> tuple[int, int]:
        return sample


def _open_split(
    data_dir: Path, split: str, tokenizer: DebertaTokenizer, masker: NGramMasker
) -> ShardDataset:
    manifest = Manifest.load(data_dir)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise ValueError(
            f"the vocabulary must be the one that the data in {data_dir} was made with; "
            f"{tokenizer.vocab_file} is another. Use {Path(data_dir) / manifest.tokenizer.file}."
        )
    if masker.max_seq_length < manifest.max_seq_length:
        raise ValueError(
            f"max_seq_length must be at least that of the data in {data_dir}, "
            f"{manifest.max_seq_length}; got {masker.max_seq_length}. Raise it, or prepare the "
            f"data with data_tools/prepare_data.py --max_seq_length {masker.max_seq_length}."
        )
    dataset = ShardDataset(data_dir, split, manifest)
    if len(dataset) == 0:
        raise ValueError(
            f"split {split!r} of {data_dir} must have at least one row; it has none. "
            "Prepare the data again, from more text, with data_tools/prepare_data.py."
        )
    return dataset


def _build_loader(
    collator: MaskingCollator,
    sampler: Iterable[tuple[int, int]],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    return DataLoader(
        _Samples(),
        sampler=sampler,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else every pass would draw from the generator of dropout
    )


def _start_worker(_: int) -> None:
    # A terminal and launchers send them to every process, and a worker that is gone is an error.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _group(batches: Iterator[Batch], accumulation_steps: int) -> Iterator[list[Batch]]:
    while True:
        yield list(islice(batches, accumulation_steps))
