"""--plan says what a training takes."""

import json
from dataclasses import replace

import pytest
import torch

from ds_deberta.config import parse
from ds_deberta.distributed import plan_world_size
from ds_deberta.model import MODELS, generator_config
from ds_deberta.plan import Shape, count_parameters, footprint, plan, trace_step
from ds_deberta.resolve import resolve
from tests.launch import ROOT, run_ranks

CONFIGS = ["zero0_fp32", "zero1_bf16", "zero2_bf16_offload", "zero3_bf16"]
PROMISED = 0.05


@pytest.fixture(autouse=True)
def _one_process_again():
    yield
    plan_world_size(1)


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("memory")
    model = MODELS["deberta-v3-nano"].to_dict() | {"vocab_size": 4096, "hidden_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(model))
    run_ranks(
        ROOT / "tests/workers/count_memory.py",
        *(str(folder / "out.json"), str(folder / "config.json"), *CONFIGS),
        world_size=2,
    )
    return json.loads((folder / "out.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_that_of_a_training(counted, name):
    planned, real = counted[name]
    assert planned == pytest.approx(real, rel=PROMISED)


def shape(objective: str = "rtd", **changes) -> Shape:
    discriminator = MODELS["deberta-v3-base"]
    configs = {"generator": generator_config(discriminator), "discriminator": discriminator}
    values = {
        "objective": objective,
        "configs": tuple(configs.items()),
        "embedding_sharing": "gdes",
        "rows": 4,
        "length": 128,
        "predictions": 19,
        "accumulates": False,
        "checkpoints_activations": False,
        "attention": "auto",
        "dtype": torch.bfloat16,
        "autocast": False,
        "device": "gpu",
    }
    return Shape(**values | changes)


def test_parameters_are_those_of_the_published_model():
    """deberta-v3-base: 86 M in the backbone and 98 M in the table, by its model card."""
    counts = count_parameters(shape())["discriminator"]
    assert counts["backbone"] == pytest.approx(86e6, rel=0.01)
    assert counts["embeddings"] == 128100 * 768 + 2 * 768


def test_parts_are_told_apart():
    """Activations grow with the rows alone, gradients with the model alone."""
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 8}}
    model = {"configs": (("model", MODELS["deberta-v3-nano"]),)}
    small, large = (
        footprint(shape("mlm", **model, rows=rows, attention="reference"), config, 1)
        for rows in (4, 8)
    )
    numbers = sum(count_parameters(shape("mlm", **model))["model"].values())
    assert small.parts["gradients"] == large.parts["gradients"] >= 2 * numbers
    assert large.parts["activations"] == pytest.approx(2 * small.parts["activations"], rel=0.2)
    for each in (small, large):
        kept = sum(each.parts[part] for part in ("weights", "fp32 masters", "moments"))
        assert kept == 14 * numbers
        assert kept + each.parts["activations"] <= each.total <= sum(each.parts.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens_per_second", "5"], "goes with --plan"),
        (["--plan", "--tokens_per_second", "0"], "must be positive"),
    ],
)
def test_a_speed_that_plans_nothing_is_refused(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        parse(["--objective", "rtd", "--model", "deberta-v3-nano", "--output_dir", "x", *flags])
    assert message in capsys.readouterr().err


def test_a_large_run_is_planned_without_gpu_and_data(tmp_path):
    run = parse(
        [
            *("--objective", "rtd", "--model", "deberta-v3-nano", "--output_dir", str(tmp_path)),
            *("--data_dir", str(tmp_path / "none"), "--expect_world_size", "32"),
            *("--micro_batch_size", "2"),
            *("--deepspeed_config", str(ROOT / "ds_configs/zero1_fp16.json")),
        ]
    )
    run = resolve(run, needs_data=False)
    others = "\n".join(('{"step": 6}', "7", '{"a":' * 100_000, '{"tokens_per_second": 2, "st'))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 5, "tokens_per_second": 1000.0}\n' + others)
    text = "\n".join(plan(run, "gpu", None))
    assert "Memory of each of 32 processes on a GPU" in text
    assert "(this run)" in text
    exporting = replace(run, train=replace(run.train, dump_interval=100, export_interval=1000))
    assert "An export: 0.13 GiB; all of them: 0.38 GiB." in "\n".join(plan(exporting, "gpu", None))
    copied = "each process holds a copy of its share in CPU memory: 0.01 GiB"  # of 12 x 33.9 M / 32
    assert copied in text
    waiting = replace(run, train=replace(run.train, save_in_background=False))
    assert "holds a copy" not in "\n".join(plan(waiting, "gpu", None))
    assert "Time: 0.1 days, 1.3 hours, at 1,000 tokens/s" in text  # 2,300 x 64 x 32 tokens
    faster = "\n".join(plan(run, "gpu", 1e6))
    assert "at 1,000,000 tokens/s (--tokens_per_second)" in faster


def test_a_table_s_gradient_in_parts_is_planned_as_its_parts():
    """When the generator updates, its logits' gradients and the rows that were read are left."""
    held = {
        defers: trace_step(
            shape(
                device="cpu",
                dtype=torch.float32,
                rows_of_tables=True,
                defers_table_gradient=defers,
            )
        ).at_update["generator"][0]
        for defers in (False, True)
    }
    table, logits, rows = 128100 * 768, 4 * 19 * 128100, 4 * 128 * 768
    assert held[False] - held[True] == pytest.approx(4 * (table - logits - rows), rel=0.01)
