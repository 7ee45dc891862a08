"""Bad numbers do not spread: no rank updates anything, it is counted, and too many end the run."""

import json
from pathlib import Path

import pytest

from tests.launch import ROOT, run_ranks

WORKERS = ROOT / "tests/workers"
FAULTS = ("nan_logits", "nan_loss", "inf_loss", "nan_gradient", "inf_gradient")

pytestmark = pytest.mark.distributed


def case(kind: str, stage: int, precision: str, data_dir: Path) -> dict[str, str]:
    return {
        "name": f"{kind}_zero{stage}_{precision}",
        "config": str(ROOT / f"ds_configs/zero{stage}_{precision}.json"),
        "objective": "mlm" if kind == "mlm" else "rtd",
        "sharing": kind,
        "data": str(data_dir),
    }


def autocast_case(kind: str, stage: int, data_dir: Path, folder: Path) -> dict[str, str]:
    """Fp32 weights, sharded, and bf16 products."""
    ds_config = json.loads((ROOT / f"ds_configs/zero{stage}_fp32.json").read_text())
    ds_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if stage == 3:
        # What DeepSpeed keeps gathered is gathered in fp32 by an update, in bf16 after a skipped
        # one: as sound, but not the same bits. So let each use gather it.
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"zero{stage}_autocast.json"
    path.write_text(json.dumps(ds_config))
    made = case(kind, stage, "autocast", data_dir)
    return made | {"config": str(path)}


def fp16_case(kind: str, stage: int, data_dir: Path, folder: Path) -> dict[str, str]:
    """With a loss scale that stays, else the step after has other roundings."""
    ds_config = json.loads((ROOT / f"ds_configs/zero{stage}_fp16.json").read_text())
    ds_config["fp16"]["min_loss_scale"] = 2 ** ds_config["fp16"]["initial_scale_power"]
    path = folder / f"zero{stage}_fp16.json"
    path.write_text(json.dumps(ds_config))
    return case(kind, stage, "fp16", data_dir) | {"config": str(path)}


def examine(cases: list[dict[str, str]], folder: Path, world_size: int) -> None:
    out_file = folder / f"found_{world_size}.json"
    run_ranks(WORKERS / "bad_numbers.py", json.dumps(cases), str(out_file), world_size=world_size)
    found = json.loads(out_file.read_text())
    assert found.keys() == {case["name"] for case in cases}
    for case in cases:
        engines = ("generator", "discriminator") if case["objective"] == "rtd" else ("model",)
        expected = {"changed": []}
        for name in engines:
            for fault in FAULTS:
                expected[f"{name} {fault}"] = skips(name, fault, case["sharing"])
        assert found[case["name"]] == expected, case["name"]


def skips(broken: str, fault: str, sharing: str) -> list[str]:
    """Who must not be updated: the broken one, and whoever lives on what it gives."""
    if broken == "model":
        return ["model"]
    both = ["generator", "discriminator"]
    if broken == "discriminator":  # with one table, its gradient goes on to the generator
        return both if sharing == "es" else ["discriminator"]
    return ["generator"] if fault.endswith("gradient") else both  # the samples are no good


def test_bad_numbers_on_one_rank_update_no_rank(data_dir, tmp_path):
    """Weights, moments, counts and schedule stay, and the next step is as if nothing had been."""
    kinds = (("mlm", 0, "bf16"), ("gdes", 3, "fp32"), ("es", 2, "bf16"))
    cases = [case(*kind, data_dir) for kind in kinds]
    examine(cases, tmp_path, world_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_numbers_update_nothing_in_any_stage_and_precision(data_dir, tmp_path, world_size):
    cases = [
        case(kind, stage, precision, data_dir)
        for kind in ("mlm", "gdes", "es", "nes")
        for stage in range(4)
        for precision in ("fp32", "bf16")
    ]
    cases += [
        autocast_case(kind, stage, data_dir, tmp_path)
        for kind in ("mlm", "gdes", "es")
        for stage in (1, 2, 3)
    ]
    cases += [
        fp16_case(kind, stage, data_dir, tmp_path)
        for kind in ("mlm", "gdes")
        for stage in (1, 2, 3)
    ]
    cases += [case(kind, 2, "bf16_offload", data_dir) for kind in ("mlm", "gdes")]
    cases += [case("gdes", 3, "bf16_offload", data_dir)]
    examine(cases, tmp_path, world_size)


def test_loss_scales_of_fp16_stay_bounded(tmp_path):
    """They double to 2**24 and no further, fall to the least one and no further, and rise again.

    DeepSpeed alone would double them to infinity, and end the run at the least one.
    """
    paths = []
    for stage in (1, 2, 3):
        ds_config = json.loads((ROOT / f"ds_configs/zero{stage}_fp16.json").read_text())
        settings = {"initial_scale_power": 22, "loss_scale_window": 2, "min_loss_scale": 4}
        ds_config["fp16"] |= settings
        paths.append(tmp_path / f"zero{stage}.json")
        paths[-1].write_text(json.dumps(ds_config))
    out_file = tmp_path / "found.json"
    run_ranks(
        WORKERS / "loss_scales.py", json.dumps([*map(str, paths)]), str(out_file), world_size=2
    )
    for steps in json.loads(out_file.read_text()):
        scales = {phase: [s for p, s, *_ in steps if p == phase] for phase, *_ in steps}
        assert (scales["well"][0], max(scales["well"]), scales["well"][-1]) == (2**22, 2**24, 2**24)
        assert (min(scales["overflow"]), scales["overflow"][-1]) == (4, 4)
        assert 4 < scales["well again"][-1] <= 2**24
        for phase, _, was_taken, has_moved in steps:
            assert was_taken == has_moved == (phase != "overflow")
