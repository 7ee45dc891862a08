"""DeepSpeed engines train as plain PyTorch does: every stage, sharing and world size."""

import json
from pathlib import Path

import pytest
import torch

from ds_deberta.data import DebertaTokenizer
from ds_deberta.data.loader import Batch, build_train_batches, build_valid_batches
from tests import plain
from tests.cases import (
    BATCH,
    CLIP,
    DISCRIMINATOR_LR,
    LR,
    RTD_LAMBDA,
    STEPS,
    build_models,
    masker,
)
from tests.checkpoints import tensors
from tests.launch import ROOT, run_ranks

SHARINGS = ["gdes", "es", "nes"]
KINDS = ["mlm", *SHARINGS]
STAGES = [0, 1, 2, 3]

# Greatest difference seen in fp32: 4e-6 in a loss. In bf16 weights and activations carry 8 bits,
# so a loss of 6 is known to about 0.02; see test_bf16_trains_as_plain_fp32.
FP32_TOLERANCE = 1e-5


def read_batches(data_dir: Path, tokenizer: DebertaTokenizer) -> list[Batch]:
    steps = build_train_batches(
        data_dir=data_dir,
        tokenizer=tokenizer,
        masker=masker(tokenizer),
        micro_batch_size=BATCH,
        accumulation_steps=1,
        seed=7,
    )
    return [next(steps)[0] for _ in range(STEPS)]


@pytest.fixture(scope="module")
def batches(data_dir: Path, tokenizer: DebertaTokenizer) -> list[Batch]:
    return read_batches(data_dir, tokenizer)


@pytest.fixture(scope="module")
def valid_batch(data_dir: Path, tokenizer: DebertaTokenizer) -> Batch:
    """All held-out rows at once."""
    (batch,) = build_valid_batches(
        data_dir=data_dir,
        tokenizer=tokenizer,
        masker=masker(tokenizer),
        micro_batch_size=24,
        seed=7,
    )
    return batch


@pytest.fixture(scope="module")
def expected(batches: list[Batch], tokenizer: DebertaTokenizer) -> dict:
    """Plain training of every kind: losses per step, and the weights at the end."""
    return {kind: train_plainly(kind, batches, tokenizer) for kind in KINDS}


def train_plainly(kind: str, batches: list[Batch], tokenizer: DebertaTokenizer) -> tuple:
    objective = "mlm" if kind == "mlm" else "rtd"
    models = build_models(objective, kind, tokenizer)
    if objective == "mlm":
        losses = plain.train_mlm(models["model"], batches, lr=LR, clip=CLIP)
    else:
        losses = plain.train_rtd(
            models["generator"],
            models["discriminator"],
            batches,
            sharing=kind,
            num_tokens=tokenizer.num_tokens,
            rtd_lambda=RTD_LAMBDA,
            lr=LR,
            discriminator_lr=DISCRIMINATOR_LR,
            clip=CLIP,
        )
    return losses, {name: model.state_dict() for name, model in models.items()}


def case(kind: str, stage: int, precision: str) -> dict[str, str]:
    return {
        "name": f"{kind}_zero{stage}_{precision}",
        "config": str(ROOT / f"ds_configs/zero{stage}_{precision}.json"),
        "objective": "mlm" if kind == "mlm" else "rtd",
        "sharing": kind,
    }


def json_optimizer_config(folder: Path) -> Path:
    """A DeepSpeed JSON that names the optimizer itself."""
    config = json.loads((ROOT / "ds_configs/zero1_fp32.json").read_text())
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    config["optimizer"] = {"type": "AdamW", "params": params | {"torch_adam": True}}
    path = folder / "zero1_fp32_json_optimizer.json"
    path.write_text(json.dumps(config))
    return path


def hierarchical_config(folder: Path, ranks: int) -> Path:
    """Every node of so many ranks keeps a copy of the weights, for the backward pass."""
    config = json.loads((ROOT / "ds_configs/zero3_fp32.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = ranks
    path = folder / "zero3_fp32_hierarchical.json"
    path.write_text(json.dumps(config))
    return path


BF16_CASES = [
    *(case(kind, stage, "bf16") for kind in ("mlm", "gdes", "es") for stage in STAGES),
    *(case("gdes", stage, "bf16_offload") for stage in (2, 3)),
]
FP16_CASES = [case("mlm", 1, "fp16"), case("nes", 2, "fp16"), case("gdes", 3, "fp16")]
PACKED_CASES = [
    each | {"name": f"{each['name']}_packed"}
    for each in (case("gdes", 2, "fp32"), case("es", 1, "fp32"), case("mlm", 3, "bf16"))
]
CASES = [
    *(case(kind, stage, "fp32") for kind in KINDS for stage in STAGES),
    case("gdes", 1, "fp32_json_optimizer"),
    *(
        case("gdes", stage, "fp32") | {"name": f"gdes_zero{stage}_fp32_checkpointing"}
        for stage in STAGES
    ),
    *BF16_CASES,
    *FP16_CASES,
    *PACKED_CASES,
    case("gdes", 3, "fp32_hierarchical"),  # the last one: its groups stay
]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def trained(
    request: pytest.FixtureRequest,
    data_dir: Path,
    packed_data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out_dir = tmp_path_factory.mktemp(f"world{request.param}")
    written = {
        "gdes_zero1_fp32_json_optimizer": str(json_optimizer_config(out_dir)),
        "gdes_zero3_fp32_hierarchical": str(hierarchical_config(out_dir, request.param)),
    }
    cases = [
        each
        | {"config": written.get(each["name"], each["config"])}
        | {"data": str(packed_data_dir if "packed" in each["name"] else data_dir)}
        for each in CASES
    ]
    run_ranks(
        ROOT / "tests/workers/train_engines.py",
        json.dumps(cases),
        str(out_dir),
        world_size=request.param,
    )
    return out_dir


def losses_of(trained: Path, name: str) -> list:
    steps = json.loads((trained / f"{name}.json").read_text())
    if name.startswith("mlm"):
        return [step["mlm_loss"] for step in steps]
    return [(step["generator_loss"], step["discriminator_loss"]) for step in steps]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_losses_equal_plain_pytorch(
    trained: Path, expected: dict, kind: str, stage: int
) -> None:
    losses = torch.tensor(losses_of(trained, f"{kind}_zero{stage}_fp32"))
    truth = torch.tensor(expected[kind][0])
    assert (truth[0] - truth[-1]).abs().max() > 100 * FP32_TOLERANCE  # it did train
    torch.testing.assert_close(losses, truth, rtol=0, atol=FP32_TOLERANCE)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_weights_equal_plain_pytorch(
    trained: Path, expected: dict, kind: str, stage: int
) -> None:
    for model, truth in expected[kind][1].items():
        weights = tensors(trained / f"{kind}_zero{stage}_fp32" / model)
        assert weights.keys() == truth.keys()
        for name, tensor in truth.items():
            if name.endswith("key_proj.bias"):
                continue  # its true gradient is zero: Adam turns rounding into full steps
            difference = (weights[name] - tensor).abs()
            # Adam moves an entry whose gradient is nearly rounding by up to lr: allow a few.
            assert (difference > 1e-5).float().mean() < 0.002, name
            assert difference.max() < STEPS * LR, name


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_changes_nothing(
    trained: Path, expected: dict, stage: int
) -> None:
    losses = torch.tensor(losses_of(trained, f"gdes_zero{stage}_fp32_checkpointing"))
    truth = torch.tensor(expected["gdes"][0])
    torch.testing.assert_close(losses, truth, rtol=0, atol=FP32_TOLERANCE)


@pytest.mark.distributed
def test_an_optimizer_named_in_the_json_gets_the_recipe(trained: Path, expected: dict) -> None:
    losses = torch.tensor(losses_of(trained, "gdes_zero1_fp32_json_optimizer"))
    truth = torch.tensor(expected["gdes"][0])
    torch.testing.assert_close(losses, truth, rtol=0, atol=FP32_TOLERANCE)


@pytest.mark.distributed
def test_hierarchical_partitions_change_nothing(trained: Path, expected: dict) -> None:
    losses = torch.tensor(losses_of(trained, "gdes_zero3_fp32_hierarchical"))
    truth = torch.tensor(expected["gdes"][0])
    torch.testing.assert_close(losses, truth, rtol=0, atol=FP32_TOLERANCE)
    for model in ("generator", "discriminator"):
        plain, found = (
            tensors(trained / f"gdes_zero3_fp32{kind}" / model) for kind in ("", "_hierarchical")
        )
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [c["name"] for c in BF16_CASES])
def test_bf16_trains_as_plain_fp32(trained: Path, expected: dict, name: str) -> None:
    losses = torch.tensor(losses_of(trained, name))
    truth = torch.tensor(expected[name.split("_")[0]][0])
    torch.testing.assert_close(losses, truth, rtol=0, atol=0.03)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [c["name"] for c in FP16_CASES])
def test_fp16_trains_as_plain_fp32(trained: Path, expected: dict, name: str) -> None:
    losses = torch.tensor(losses_of(trained, name))
    truth = torch.tensor(expected[name.split("_")[0]][0])
    torch.testing.assert_close(losses, truth, rtol=0, atol=0.03 / 8)  # three bits more than bf16


@pytest.mark.distributed
@pytest.mark.parametrize("name", [c["name"] for c in PACKED_CASES])
def test_packed_documents_train_as_in_plain_pytorch(
    trained: Path, packed_data_dir: Path, tokenizer: DebertaTokenizer, name: str
) -> None:
    batches = read_batches(packed_data_dir, tokenizer)
    assert {batch.documents.max().item() for batch in batches} == {3}
    truth, _ = train_plainly(name.split("_")[0], batches, tokenizer)
    tolerance = FP32_TOLERANCE if "fp32" in name else 0.03
    losses = torch.tensor(losses_of(trained, name))
    torch.testing.assert_close(losses, torch.tensor(truth), rtol=0, atol=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["mlm", "gdes"])
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_is_that_of_one_process(
    trained: Path, expected: dict, valid_batch: Batch, tokenizer: DebertaTokenizer, kind, stage
) -> None:
    """24 rows in batches of 5 for each rank, the last ones filled up with empty rows."""
    values = json.loads((trained / f"{kind}_zero{stage}_fp32_valid.json").read_text())
    objective = "mlm" if kind == "mlm" else "rtd"
    models = build_models(objective, kind, tokenizer)
    for name, weights in expected[kind][1].items():
        models[name].load_state_dict(weights)
    with torch.no_grad():
        truth = (
            plain.evaluate_mlm(models["model"], valid_batch)
            if kind == "mlm"
            else plain.evaluate_rtd(
                models["generator"], models["discriminator"], valid_batch, tokenizer.num_tokens
            )
        )
    assert {name: values[name] for name in truth} == pytest.approx(truth, abs=2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norms_are_the_same_in_every_stage(trained: Path, stage: int) -> None:
    def norms(zero: int) -> torch.Tensor:
        steps = json.loads((trained / f"gdes_zero{zero}_fp32.json").read_text())
        return torch.tensor([[s["norm_generator"], s["norm_discriminator"]] for s in steps])

    assert (norms(1) > CLIP).any()  # clipping is at work
    torch.testing.assert_close(norms(stage), norms(1), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_layers_train_as_plain_pytorch(
    expected: dict, packed_data_dir: Path, data_dir: Path, tokenizer: DebertaTokenizer, tmp_path
) -> None:
    """With rows of one document, of several, and with activations made again."""
    cases = [
        case("gdes", 0, "fp32") | {"name": "gdes_compiled", "data": str(data_dir)},
        case("gdes", 1, "fp32") | {"name": "gdes_compiled_checkpointing", "data": str(data_dir)},
        case("gdes", 2, "fp32") | {"name": "gdes_compiled_packed", "data": str(packed_data_dir)},
    ]
    worker = ROOT / "tests/workers/train_engines.py"
    run_ranks(worker, json.dumps(cases), str(tmp_path), timeout=900)  # compilers take minutes
    packed, _ = train_plainly("gdes", read_batches(packed_data_dir, tokenizer), tokenizer)
    for each in cases:
        truth = packed if "packed" in each["name"] else expected["gdes"][0]
        losses = torch.tensor(losses_of(tmp_path, each["name"]))
        torch.testing.assert_close(losses, torch.tensor(truth), rtol=0, atol=FP32_TOLERANCE)
