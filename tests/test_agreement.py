import json
import shutil

import pytest

from tests.launch import ROOT, run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_rank_with_other_code_data_or_configuration_is_named(
    data_dir, tiny_model_file, tmp_path, split
):
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["splits"][split]["shards"][0]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    flags = ["--objective", "mlm", "--model", str(tiny_model_file), "--data_dir", str(data_dir)]
    flags += ["--output_dir", str(tmp_path / "run")]
    run_ranks(ROOT / "tests/workers/agreement.py", json.dumps(flags), str(other), world_size=2)
