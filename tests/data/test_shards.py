import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from ds_deberta.data import Manifest, ShardDataset, ShardWriter, load_tokenizer
from ds_deberta.data.shards import SCHEMA


def test_rows_come_back_as_they_were_written(data):
    dataset = ShardDataset(data.folder, "train", data.manifest)
    assert len(dataset) == 41
    for row, expected in enumerate(data.rows["train"]):
        assert dataset[row].dtype == np.int32
        np.testing.assert_array_equal(dataset[row], expected)
    with pytest.raises(IndexError):
        dataset[41]
    with pytest.raises(IndexError):
        dataset[-1]


def test_shards_are_plain_arrow_files_with_true_counts(data):
    shards = data.manifest.splits["train"].shards
    assert [shard.rows for shard in shards] == [10, 10, 10, 10, 1]
    assert [shard.file for shard in shards] == [f"train/0000{i}.arrow" for i in range(5)]
    start = 0
    for shard in shards:
        table = pa.ipc.open_file(data.folder / shard.file).read_all()
        expected = data.rows["train"][start : start + shard.rows]
        assert table.schema == SCHEMA
        assert table["ids"].to_pylist() == [row.tolist() for row in expected]
        assert shard.tokens == sum(map(len, expected))
        assert shard.bytes == (data.folder / shard.file).stat().st_size
        start += shard.rows


def test_reading_a_row_copies_nothing(data):
    dataset = ShardDataset(data.folder, "train", data.manifest)
    first, second = dataset[0], dataset[1]
    assert not first.flags.writeable
    assert second.ctypes.data == first.ctypes.data + first.nbytes  # side by side in one map
    copy = first.copy()
    del dataset
    np.testing.assert_array_equal(first, copy)  # the row keeps its map alive


def test_a_pickled_dataset_maps_the_files_anew(data):
    dataset = ShardDataset(data.folder, "train", data.manifest)
    unread = pickle.dumps(dataset)
    for row in range(41):
        dataset[row]
    assert pickle.dumps(dataset) == unread  # no rows in it
    np.testing.assert_array_equal(pickle.loads(unread)[40], data.rows["train"][40])


def test_a_writer_can_go_on_at_a_later_shard_and_leaves_no_temporary_files(tmp_path):
    for first_shard in (0, 2):
        writer = ShardWriter(tmp_path / "train", rows_per_shard=2, first_shard=first_shard)
        for value in range(3):
            writer.write(np.array([value]))
        assert [shard.rows for shard in writer.close()] == [2, 1]
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        f"0000{i}.arrow" for i in range(4)
    ]
    assert ShardWriter(tmp_path / "empty").close() == []


def test_a_writer_says_when_a_shard_is_full_and_keeps_rows_of_any_length(tmp_path):
    writer = ShardWriter(tmp_path / "train", rows_per_shard=3)
    rows = [np.arange(length) + length for length in (40_000, 1, 70_000, 200_000, 5)]
    assert [writer.write(row) for row in rows] == [False, False, True, False, False]
    assert [shard.tokens for shard in writer.close()] == [110_001, 200_005]
    written = [
        row.as_py()
        for name in ("00000.arrow", "00001.arrow")
        for row in pa.ipc.open_file(tmp_path / "train" / name).get_batch(0).column("ids")
    ]
    assert written == [row.tolist() for row in rows]


def test_the_manifest_comes_back_as_it_was_saved(data):
    assert Manifest.load(data.folder) == data.manifest
    fields = json.loads((data.folder / "manifest.json").read_text())
    assert fields["format_version"] == 1
    assert fields["splits"]["valid"]["rows"] == 23
    assert fields["tokenizer"]["file"] == "spm.model"


def test_a_crash_while_saving_leaves_the_old_manifest(data, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        replace(data.manifest, max_seq_length=999).save(data.folder)
    assert Manifest.load(data.folder) == data.manifest


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json.*prepare_data"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged.*prepare_data"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("layout", ["as it was", "without"])
def test_a_manifest_must_have_its_own_checksum(data, layout):
    path = data.folder / "manifest.json"
    fields = json.loads(path.read_text())
    if layout == "without":
        del fields["sha256"]
    path.write_text(json.dumps(fields))
    if layout == "as it was":
        assert Manifest.load(data.folder) == data.manifest
    else:
        with pytest.raises(ValueError, match="damaged, or of an older version: it must have the"):
            Manifest.load(data.folder)


def test_another_format_version_is_refused(data):
    replace(data.manifest, format_version=2).save(data.folder)
    with pytest.raises(ValueError, match="must have format version 1; it has 2"):
        Manifest.load(data.folder)


def test_an_unknown_split_is_refused(data):
    with pytest.raises(ValueError, match="no split 'test'; it has train, valid"):
        ShardDataset(data.folder, "test", data.manifest)


def test_a_missing_shard_is_named(data):
    (data.folder / "train/00003.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"00003\.arrow .*missing.*prepare_data"):
        ShardDataset(data.folder, "train", data.manifest)


def test_a_cut_shard_is_named(data):
    path = data.folder / "train/00002.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"00002\.arrow must have \d+ bytes; it has \d+.*prepare"):
        ShardDataset(data.folder, "train", data.manifest)


def test_a_shard_of_garbage_is_named(data):
    path = data.folder / "train/00002.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"00002\.arrow is not a shard.*prepare"):
        ShardDataset(data.folder, "train", data.manifest)


def test_a_shard_with_other_row_counts_is_named(data):
    split = data.manifest.splits["valid"]
    first, second, third = split.shards
    wrong = (replace(first, rows=9), replace(second, rows=11), third)
    manifest = replace(data.manifest, splits={"valid": replace(split, shards=wrong)})
    with pytest.raises(ValueError, match=r"00000\.arrow must have 9 rows; it has 10"):
        ShardDataset(data.folder, "valid", manifest)
    manifest = replace(data.manifest, splits={"valid": replace(split, rows=24)})
    with pytest.raises(ValueError, match=r"must have 24 rows by its manifest\.json"):
        ShardDataset(data.folder, "valid", manifest)


def test_verify_finds_one_flipped_bit(data):
    dataset = ShardDataset(data.folder, "train", data.manifest)
    dataset.verify()
    path = data.folder / "train/00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001\.arrow is not what was written"):
        ShardDataset(data.folder, "train", data.manifest).verify()


def test_the_vocabulary_in_the_folder_must_be_the_one_of_the_data(
    data, tokenizer, train_vocabulary
):
    assert load_tokenizer(data.folder).sha256 == tokenizer.sha256
    train_vocabulary(data.folder / "spm.model", control_symbols=["[MASK]"])
    with pytest.raises(ValueError, match=r"spm\.model must be the vocabulary that the data was"):
        load_tokenizer(data.folder)
