"""Token ids on disk: Arrow shards with a manifest, written once and memory-mapped for reading.

A data folder holds

    manifest.json            what the data is: vocabulary, row length, counts, hashes
    spm.model                the vocabulary the rows were made with
    train/00000.arrow ...    rows; Arrow IPC files, uncompressed, one record batch with the one
    valid/00000.arrow ...    column `ids`: list<int32>, without [CLS], [SEP] or padding;
                             of packed data with [SEP] [CLS] between a row's documents

Opening it costs a look at every shard's footer and nothing per row; a row is a slice of the map.
`find_damage` reads all of it.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from ds_deberta.data.tokenizer import DebertaTokenizer

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
ROWS_PER_SHARD = 32_768  # 64 MiB of full rows of 512
SCHEMA = pa.schema([pa.field("ids", pa.list_(pa.int32()))])
CURE = "Prepare the data again with data_tools/prepare_data.py --overwrite."
CHECKSUM = "sha256"  # in the manifest: of all its other fields


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard: `file` is relative to the data folder, `tokens` and `bytes` are totals."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split; its rows are its shards' rows in order."""

    rows: int
    tokens: int
    documents: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The vocabulary: `file` is relative to the data folder."""

    file: str
    sha256: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data folder holds.

    `max_seq_length` counts [CLS] and [SEP], which rows lack at their ends. Where `packed`, a row is
    one or more documents apart from each other, with [SEP] [CLS] between them. `documents` says
    what a document of plain text was: a whole file, what stands between blank lines, or a line.
    """

    tokenizer: TokenizerInfo
    max_seq_length: int
    keep_documents_apart: bool
    packed: bool = False
    documents: str = "file"
    splits: dict[str, SplitInfo]
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, data_dir: Path) -> "Manifest":
        """Read the manifest of a data folder."""
        path = Path(data_dir) / MANIFEST_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{data_dir} must be a folder of prepared data, but has no {MANIFEST_FILE}. "
                "Give another --data_dir, or prepare the data with data_tools/prepare_data.py."
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is damaged: not a manifest. {CURE}") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} must have format version {FORMAT_VERSION}; it has {version}. {CURE}"
            )
        if fields.pop(CHECKSUM, None) != checksum(fields):
            raise ValueError(
                f"{path} is damaged, or of an older version: it must have the {CHECKSUM} of its "
                "other fields. Give the command that prepared the data once more: data_tools/"
                "prepare_data.py writes the manifest anew where the shards are whole."
            )
        try:
            return _parse_manifest(fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}. {CURE}") from None

    def save(self, data_dir: Path) -> None:
        """Write the manifest; a crash leaves the old one or the new one, never half of it."""
        fields = asdict(self)
        text = json.dumps(fields | {CHECKSUM: checksum(fields)}, indent=2) + "\n"
        write_durably(Path(data_dir) / MANIFEST_FILE, lambda file: file.write(text.encode()))


class ShardWriter:
    """Write rows to numbered shards in `folder`, each complete on disk before it has its name.

    Args:
        folder: The split's folder in the data folder, e.g. DATA/train; it is made.
        rows_per_shard: As many rows are held in memory.
        first_shard: Number of the first shard, for a restart or for one worker of several.

    Attributes:
        shards: What is on disk, in order.
    """

    def __init__(self, folder: Path, *, rows_per_shard: int = ROWS_PER_SHARD, first_shard: int = 0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_per_shard = rows_per_shard
        self.first_shard = first_shard
        self.shards: list[ShardInfo] = []
        self._offsets = [0]
        self._ids = np.empty(1 << 16, dtype=np.int32)  # for all shards: new memory costs time

    def write(self, row: np.ndarray) -> bool:
        """Add one row of token ids; True if that fills a shard, which is on disk then."""
        start, end = self._offsets[-1], self._offsets[-1] + len(row)
        if end > len(self._ids):
            grown = np.empty(2 * end, dtype=np.int32)
            grown[:start] = self._ids[:start]
            self._ids = grown
        self._ids[start:end] = row
        self._offsets.append(end)
        is_full = len(self._offsets) > self.rows_per_shard
        if is_full:
            self._write_shard()
        return is_full

    def close(self) -> list[ShardInfo]:
        """Write what is left and return all shards written, in order."""
        if len(self._offsets) > 1:
            self._write_shard()
        return self.shards

    def _write_shard(self) -> None:
        path = self.folder / f"{self.first_shard + len(self.shards):05d}.arrow"
        rows, tokens = len(self._offsets) - 1, self._offsets[-1]
        offsets = pa.array(self._offsets, type=pa.int32())
        ids = pa.ListArray.from_arrays(offsets, pa.array(self._ids[:tokens]))
        digest = hashlib.sha256()

        def write(file: IO[bytes]) -> None:
            sink = _HashingSink(file, digest.update)
            with pa.ipc.new_file(sink, SCHEMA) as writer:
                writer.write_batch(pa.record_batch([ids], schema=SCHEMA))

        write_durably(path, write)
        self.shards.append(
            ShardInfo(
                file=f"{self.folder.name}/{path.name}",
                rows=rows,
                tokens=tokens,
                bytes=path.stat().st_size,
                sha256=digest.hexdigest(),
            )
        )
        self._offsets = [0]


class ShardDataset:
    """The rows of one split, int32 [<= max_seq_length - 2] each, straight from the memory map.

    Shards are mapped when first read, so a dataset is cheap to open, to pickle and to fork.
    """

    def __init__(self, data_dir: Path, split: str, manifest: Manifest):
        self.is_packed = manifest.packed
        if split not in manifest.splits:
            raise ValueError(
                f"{data_dir} has no split {split!r}; it has {', '.join(manifest.splits) or 'none'}"
            )
        self.data_dir = Path(data_dir)
        self.shards = manifest.splits[split].shards
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        self._mapped: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if len(self) != manifest.splits[split].rows:
            raise ValueError(
                f"split {split!r} of {data_dir} must have {manifest.splits[split].rows} rows by "
                f"its {MANIFEST_FILE}; its shards have {len(self)}. {CURE}"
            )
        for shard in self.shards:
            _open_shard(self.data_dir, shard)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the ids of one row: a read-only view, valid as long as it is referenced."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect_right(self._ends, row)
        if number not in self._mapped:
            self._mapped[number] = _open_shard(self.data_dir, self.shards[number])
        offsets, ids = self._mapped[number]
        local = row - (self._ends[number] - self.shards[number].rows)
        return ids[offsets[local] : offsets[local + 1]]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    def verify(self) -> None:
        """Read every shard and compare its hash with the manifest's."""
        if damage := find_damage(self.data_dir, self.shards):
            raise ValueError("\n".join(damage))


def find_damage(data_dir: Path, shards: Iterable[ShardInfo]) -> list[str]:
    """Read shards to the end. Returns what is wrong with those that are not what was written."""
    damage: list[str] = []
    for shard in shards:
        path = Path(data_dir) / shard.file
        try:
            size = path.stat().st_size
            if size != shard.bytes:
                damage.append(f"{path} must have {shard.bytes} bytes; it has {size}. {CURE}")
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            damage.append(f"shard {path} of {MANIFEST_FILE} is missing. {CURE}")
        except OSError as error:
            damage.append(f"{path} can not be read: {error.strerror}. {CURE}")
        else:
            if digest != shard.sha256:
                damage.append(f"{path} is not what was written: its hash differs. {CURE}")
    return damage


def checksum(fields: Mapping[str, Any]) -> str:
    """The sha256 of what JSON holds, however it is laid out."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_tokenizer(data_dir: Path) -> DebertaTokenizer:
    """Load the vocabulary that the data in `data_dir` was made with."""
    info = Manifest.load(data_dir).tokenizer
    path = Path(data_dir) / info.file
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != info.sha256:
        raise ValueError(
            f"{path} must be the vocabulary that the data was made with, but its hash differs "
            f"from the one in {MANIFEST_FILE}. Put the right one back. Else: {CURE}"
        )
    return DebertaTokenizer(path)


def _parse_manifest(fields: dict[str, Any]) -> Manifest:
    splits = {
        name: SplitInfo(**split | {"shards": tuple(ShardInfo(**s) for s in split["shards"])})
        for name, split in fields["splits"].items()
    }
    return Manifest(
        **fields | {"tokenizer": TokenizerInfo(**fields["tokenizer"]), "splits": splits}
    )


def _open_shard(data_dir: Path, shard: ShardInfo) -> tuple[np.ndarray, np.ndarray]:
    """Map one shard, check it against the manifest, and return its row offsets and ids."""
    path = data_dir / shard.file
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} of {MANIFEST_FILE} is missing. {CURE}")
    if (size := path.stat().st_size) != shard.bytes:
        raise ValueError(f"{path} must have {shard.bytes} bytes; it has {size}. {CURE}")
    try:
        # Closing frees the file descriptor (there may be thousands); the arrays keep the map.
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
            column = batch.column("ids")
            offsets, ids = column.offsets.to_numpy(), column.values.to_numpy()
    except (pa.ArrowInvalid, OSError, KeyError, AttributeError) as error:  # a footer: OSError
        raise ValueError(f"{path} is not a shard: {error}. {CURE}") from None
    if batch.num_rows != shard.rows:
        raise ValueError(f"{path} must have {shard.rows} rows; it has {batch.num_rows}. {CURE}")
    return offsets, ids


class _HashingSink:
    """A file for pyarrow to write to, which hands every block to a hash as well."""

    closed = False

    def __init__(self, file: IO[bytes], update: Callable[[Any], None]):
        self._file, self._update = file, update

    def write(self, block: Any) -> int:
        self._update(block)
        return self._file.write(block)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Leave the file open: its owner still has to bring it to disk."""


def write_durably(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a temporary file, bring it to disk, and only then give it its name.

    Raises:
        OSError: no room, or no right to write there; names the file, and leaves none of its own.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror or error}, while writing", str(path)) from None
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
