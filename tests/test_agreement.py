import json
import shutil
from dataclasses import replace

import pytest

from ds_deberta.data import Manifest
from tests.launch import ROOT, run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_rank_with_other_code_data_or_configuration_is_named(
    data_dir, tiny_model_file, tmp_path, split
):
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    manifest = Manifest.load(other)
    first, *rest = manifest.splits[split].shards
    shards = (replace(first, sha256="0" * 64), *rest)
    splits = manifest.splits | {split: replace(manifest.splits[split], shards=shards)}
    replace(manifest, splits=splits).save(other)
    flags = ["--objective", "mlm", "--model", str(tiny_model_file), "--data_dir", str(data_dir)]
    flags += ["--output_dir", str(tmp_path / "run")]
    run_ranks(ROOT / "tests/workers/agreement.py", json.dumps(flags), str(other), world_size=2)
