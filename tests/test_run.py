"""Whole runs, started as users start them."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from ds_deberta.data import DebertaTokenizer
from ds_deberta.hf import export_checkpoint
from ds_deberta.model import DebertaForMaskedLM, DebertaForRTD, load_model_config
from ds_deberta.warm_start import load_pretrained
from ds_deberta.weights import public_names
from tests.conftest import write_data
from tests.launch import ROOT, clean_environment, free_port, left_in_shared_memory
from tests.test_compatibility import write_public

BIN = Path(sys.executable).parent


def run(*command: str, status: int = 0) -> str:
    """Run a command of this environment in the checkout; returns what it printed."""
    environment = clean_environment() | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    output = done.stdout + done.stderr
    assert done.returncode == status, output[-3000:]
    return output


def flags(data_dir: Path, model: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--data_dir", str(data_dir), "--output_dir", str(output_dir)),
        *("--max_seq_length", "32", "--train_batch_size", "8", "--num_training_steps", "6"),
        *("--learning_rate", "1e-3", "--warmup", "2", "--num_workers", "0"),
        *("--log_interval", "2", "--eval_interval", "3", "--dump_interval", "3"),
        *more,
    ]


@pytest.fixture(scope="module")
def finished(
    data_dir: Path, tiny_model_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """An RTD run through the deepspeed launcher, in bf16, while its default port is in use."""
    output_dir = tmp_path_factory.mktemp("runs") / "rtd"
    before = set(os.listdir("/dev/shm"))
    more = ("--objective", "rtd", "--export_interval", "3")
    arguments = flags(data_dir, tiny_model_file, output_dir, *more)
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # somebody else's already
            other.bind(("127.0.0.1", 29500))
            other.listen()
        printed = run("deepspeed", "run_pretrain.py", *arguments)
    assert not left_in_shared_memory(before)  # DeepSpeed would leave 66 MiB per rank
    return output_dir, printed


@pytest.mark.distributed
def test_a_run_leaves_its_configuration_metrics_and_curves(finished):
    output_dir, printed = finished
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in rows] == [
        (2, "train"),
        (3, "valid"),
        (4, "train"),
        (6, "train"),
        (6, "valid"),
    ]
    names = {
        "generator_loss",
        "discriminator_loss",
        "mlm_accuracy",
        "perplexity",
        "replaced_fraction",
        "rtd_auc",
        "rtd_average_precision",
        "rtd_gain",
    }
    assert names <= rows[1].keys()
    speed = {"learning_rate", "tokens_per_second", "mfu", "data_wait_fraction", "memory_gib"}
    norms = {"grad_norm_generator", "grad_norm_discriminator"}
    assert names | speed | norms <= rows[0].keys()
    assert json.loads((output_dir / "config.json").read_text())["learning_rate"] == 1e-3
    assert list((output_dir / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (output_dir / "checkpoints").iterdir()) == [
        "step_0000003",
        "step_0000006",
    ]
    assert "each step: 1 processes x 1 micro-batches x 8 rows" in printed
    assert "a model that ignores the context would reach loss " in printed
    assert "step 6/6" in printed


@pytest.mark.distributed
def test_the_export_loads_in_transformers_and_keeps_the_tokenizer(finished, data_dir):
    output_dir, _ = finished
    for name in ("generator", "discriminator"):
        folder = output_dir / "export" / name
        _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        heads = {key.split(".")[0] for key in info.pop("unexpected_keys")}
        assert heads == {"generator": {"cls"}, "discriminator": {"mask_predictions"}}[name]
        assert not any(info.values()), info
        text = "The old  king builds a river, and the city runs."
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert ids[1:-1] == DebertaTokenizer(data_dir / "spm.model").encode(text)


@pytest.mark.distributed
def test_a_finished_run_started_again_does_nothing(finished, data_dir, tiny_model_file):
    output_dir, _ = finished
    before = (output_dir / "metrics.jsonl").read_text()
    arguments = flags(data_dir, tiny_model_file, output_dir, "--objective", "rtd")
    assert "the training was complete already" in run(sys.executable, "run_pretrain.py", *arguments)
    assert (output_dir / "metrics.jsonl").read_text() == before


@pytest.mark.distributed
def test_a_finished_run_exports_what_it_could_not_export(
    finished, data_dir, tiny_model_file, tmp_path
):
    """Its last export is of an earlier checkpoint, and there is no room for a new one at first."""
    output_dir = tmp_path / "run"
    shutil.copytree(finished[0], output_dir)
    export = output_dir / "export"
    shutil.rmtree(export)
    export_checkpoint(output_dir / "checkpoints/step_0000003", export)
    command = [
        *(sys.executable, "run_pretrain.py"),
        *flags(data_dir, tiny_model_file, output_dir, "--objective", "rtd"),
    ]
    export.with_suffix(".tmp").touch()  # in the way of the new one

    printed = run(*command, status=1)
    assert "step_0000006 could not be exported" in printed
    assert "checkpoint is kept" in printed
    assert "Traceback" not in printed
    assert json.loads((export / "export.json").read_text())["step"] == 3

    export.with_suffix(".tmp").unlink()
    printed = run(*command)
    assert f"exported {output_dir / 'checkpoints/step_0000006'}" in printed
    for file in (path for path in export.rglob("*") if path.is_file()):
        expected = finished[0] / "export" / file.relative_to(export)
        assert file.read_bytes() == expected.read_bytes(), file


@pytest.mark.distributed
def test_a_checkpoint_exports_after_the_fact_to_the_same_weights(finished, tmp_path):
    output_dir, _ = finished
    checkpoint = output_dir / "checkpoints/step_0000006"
    run(sys.executable, "-m", "ds_deberta.hf", str(checkpoint), str(tmp_path / "out"))
    for name in ("generator", "discriminator"):
        expected = load_file(output_dir / "export" / name / "model.safetensors")
        got = load_file(tmp_path / "out" / name / "model.safetensors")
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.distributed
def test_a_run_exports_on_the_way(finished):
    exports = finished[0] / "exports"
    names = ["step_0000003", "step_0000006"]
    assert sorted(folder.name for folder in exports.iterdir()) == names
    weights = [exports / name / "discriminator/model.safetensors" for name in names]
    last = finished[0] / "export/discriminator/model.safetensors"
    assert weights[1].read_bytes() == last.read_bytes() != weights[0].read_bytes()


@pytest.mark.distributed
def test_a_run_starts_from_an_export(finished, data_dir, tiny_model_file, tmp_path):
    """The first loss is the one that the exported models have, not a fresh model's."""
    export = finished[0] / "export"
    printed = run(
        sys.executable,
        "run_pretrain.py",
        *flags(data_dir, tiny_model_file, tmp_path, "--objective", "rtd"),
        *("--init_generator", str(export / "generator")),
        *("--init_discriminator", str(export / "discriminator")),
        *("--learning_rate", "1e-9", "--deepspeed_config", "ds_configs/zero0_fp32.json"),
    )
    assert "fresh: none" in printed
    old = json.loads((finished[0] / "metrics.jsonl").read_text().splitlines()[-1])
    new = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    # The old run evaluated in bf16, whose rounding moves a loss of 5 by about 0.02.
    for name in ("generator_loss", "discriminator_loss"):
        assert new[name] == pytest.approx(old[name], abs=0.03)


@pytest.mark.distributed
def test_a_continue_preset_takes_its_sizes_from_public_files(
    data_dir, vocab_file, tiny_config, tmp_path
):
    """The generator was not published, as that of the public base model."""
    public = tmp_path / "public"
    write_public(public, replace(tiny_config, num_hidden_layers=4), vocab_file)
    (public / "pytorch_model.generator.bin").unlink()

    def start(output_dir: Path, discriminator: Path, *more: str, status: int = 0) -> str:
        return run(
            *("./rtd.sh", "deberta-v3-base-continue", "--init_discriminator", str(discriminator)),
            *flags(data_dir, Path("deberta-v3-base-continue"), output_dir, *more),
            status=status,
        )

    printed = start(tmp_path / "one", public)
    assert "there is no --init_generator, so the generator starts from the disc" in printed
    assert "layers 0, 2 and a fresh head" in printed
    models = tmp_path / "one" / "export"
    rows = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["generator_loss"] < rows[0]["generator_loss"]

    # Weights of a checkpoint are those of its export, the discriminator's up to one rounding.
    checkpoint = tmp_path / "one" / "checkpoints" / "step_0000006"
    for name, place in (("generator", checkpoint), ("discriminator", checkpoint / "discriminator")):
        exported = load_file(models / name / "model.safetensors")
        expected = public_names(exported, role=name, num_heads=tiny_config.num_attention_heads)
        config = load_model_config(models / name)
        generator = load_file(models / "generator" / "model.safetensors")
        model = DebertaForMaskedLM(config) if name == "generator" else DebertaForRTD(config)
        report = load_pretrained(model, place, role=name, generator=generator)
        assert report.fresh == {}
        assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected)

    more = ("--init_generator", str(checkpoint), "--learning_rate", "1e-9")
    assert "fresh: none" in start(tmp_path / "two", checkpoint, *more)
    old = json.loads((tmp_path / "one/metrics.jsonl").read_text().splitlines()[-1])
    new = json.loads((tmp_path / "two/metrics.jsonl").read_text().splitlines()[-1])
    for name in ("generator_loss", "discriminator_loss"):
        assert new[name] == pytest.approx(old[name], abs=0.03)

    printed = start(tmp_path / "three", public, "--max_seq_length", "64", status=2)
    assert "max_seq_length must be at most 32, the positions that these weights know" in printed
    assert "Traceback" not in printed


@pytest.mark.distributed
def test_mlm_trains_on_two_processes_of_torchrun(data_dir, tiny_model_file, tmp_path):
    run(
        "torchrun",
        *("--nproc_per_node", "2", "--master_port", str(free_port()), "run_pretrain.py"),
        *flags(data_dir, tiny_model_file, tmp_path / "run", "--objective", "mlm"),
        *("--max_ngram", "3", "--deepspeed_config", "ds_configs/zero3_fp32.json"),
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["mlm_loss"] < rows[0]["mlm_loss"]
    _, info = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "run/export/model", output_loading_info=True
    )
    assert not any(info.values()), info


@pytest.mark.distributed
def test_what_a_user_can_mend_ends_with_status_2(finished, data_dir, tiny_model_file, tmp_path):
    output_dir, _ = finished

    def fails(*more: str, data: Path = data_dir, out: Path = output_dir) -> str:
        arguments = flags(data, tiny_model_file, out, "--objective", "rtd", *more)
        printed = run(sys.executable, "run_pretrain.py", *arguments, status=2)
        assert "Traceback" not in printed
        return printed

    assert "seed: 1234 then, 5 now" in fails("--seed", "5")
    assert "--resume is never" in fails("--resume", "never")
    assert "must be a folder of prepared data" in fails(data=tmp_path, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("script", "preset"), [("rtd.sh", "deberta-v3-base"), ("mlm.sh", "bert-base")]
)
@pytest.mark.parametrize("word", [None, "no-such-preset"])
def test_scripts_list_their_presets(script, preset, word):
    printed = run(f"./{script}", *([word] if word else []), status=2)
    assert preset in printed
    assert "M parameters" in printed


@pytest.mark.distributed
def test_a_run_without_held_out_rows_ends_with_its_minutes(vocab_file, tiny_model_file, tmp_path):
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data", vocab_file, valid_rows=0)
    printed = run(
        *(sys.executable, "run_pretrain.py"),
        *flags(data, tiny_model_file, tmp_path / "run", "--objective", "rtd"),
        *("--num_training_steps", "1000000", "--max_minutes", "0.03", "--dump_interval", "1000000"),
        *("--deepspeed_config", "ds_configs/zero0_fp32.json"),
    )
    assert printed.count("has no held-out rows: this run does not evaluate") == 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train"}
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    state = json.loads((checkpoint / "checkpoint.json").read_text())["state"]
    assert state["step"] == rows[-1]["step"] < 1_000_000
    assert state["seconds"] >= 60 * 0.03
    assert (tmp_path / "run/export/discriminator/model.safetensors").is_file()
