import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from ds_deberta import engine
from ds_deberta.distributed import plan_world_size
from ds_deberta.ds_remarks import remarks
from ds_deberta.engine import (
    DeepSpeedFacts,
    load_ds_config,
    offload_device,
    precision,
    zero_stage,
)
from ds_deberta.optim import OptimConfig
from tests.launch import ROOT

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def facts(**optim) -> DeepSpeedFacts:
    return DeepSpeedFacts(
        train_batch_size=64,
        micro_batch_size=8,
        hidden_size=256,
        lr=1e-3,
        optim=OptimConfig(learning_rate=1e-3, **optim),
    )


def write(tmp_path: Path, **config) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def sixteen_processes():
    plan_world_size(16)
    yield
    plan_world_size(1)


NEEDS = {
    "fp16": "fp16, which this machine does not compute in",
    "zeropp": "which needs a GPU",
    "nvme": "NVMe disk",
}
NEEDS |= {"offload": None, "bf16": None, "fp32": None, "auto": None}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_what_its_name_says(path, sixteen_processes):
    """DeepSpeed's own model of its configuration has read it, too."""
    config = load_ds_config(path, replace(facts(), train_batch_size=1024), runs_here=False)
    assert '"auto"' not in json.dumps(config)
    assert config["gradient_accumulation_steps"] == 8
    assert config["gradient_clipping"] == 1.0
    stage, kind, *options = path.stem.split("_")
    assert stage == f"zero{zero_stage(config)}"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    assert kind in ("auto", names[precision(config)])
    zero = config["zero_optimization"]
    offload = {name: offload_device(config, name) for name in ("optimizer", "param")}
    inner = "cpu" if stage == "zero3" else "none"
    match options:
        case ["offload"]:
            assert offload == {"optimizer": "cpu", "param": inner}
        case ["nvme"]:
            assert offload == {"optimizer": "nvme", "param": "cpu"}
            assert config["aio"]
        case ["zeropp"]:
            assert zero["zero_hpz_partition_size"] == 8
            assert zero["zero_quantized_weights"]
            assert zero["zero_quantized_gradients"]
        case _:
            assert offload == {"optimizer": "none", "param": "none"}
    if stage == "zero1":  # or it copies each gradient to a bucket and out of it, one by one
        assert zero["contiguous_gradients"] is False
    if stage == "zero2":  # or DeepSpeed lays each bucket flat, and copies it back
        assert zero["reduce_scatter"] is False
        assert config["prescale_gradients"] is True  # a sum of fp16 gradients may overflow


@pytest.mark.parametrize(("hidden_size", "elements"), [(64, 2**20), (768, 24 * 768**2)])
def test_a_bucket_holds_the_gradients_of_two_layers(hidden_size, elements):
    path = ROOT / "ds_configs/zero1_fp32.json"
    config = load_ds_config(path, replace(facts(), hidden_size=hidden_size))
    assert config["zero_optimization"]["reduce_bucket_size"] == elements


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what these need")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_this_machine_lacks_is_named(path, sixteen_processes, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)  # few CPUs have it
    needed = next(message for kind, message in NEEDS.items() if kind in path.stem)
    wide = replace(facts(), train_batch_size=1024)
    if needed is None:
        load_ds_config(path, wide)
    else:
        with pytest.raises(ValueError, match=needed):
            load_ds_config(path, wide)


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_this_machine_multiplies_in_it(monkeypatch, has_it, expected):
    monkeypatch.setattr(engine, "computes_in_bf16", lambda: has_it)
    path = ROOT / "ds_configs/zero1_auto.json"
    assert precision(load_ds_config(path, facts())) == expected
    assert precision(load_ds_config(path, facts(), runs_here=False)) == torch.bfloat16


def test_values_that_deepspeed_refuses_are_named(tmp_path):
    path = write(tmp_path, zero_optimization={"stag": 3})
    with pytest.raises(ValueError, match="DeepSpeedZeroConfig: stag: Extra inputs"):
        load_ds_config(path, facts())
    path = write(tmp_path, zero_optimization={"stage": 7})
    with pytest.raises(ValueError, match="stage must be 0, 1, 2 or 3"):
        load_ds_config(path, facts())


@pytest.mark.parametrize(
    "option", [{"offload_param": {"device": "cpu"}}, {"zero_hpz_partition_size": 2}]
)
def test_options_of_stage_3_are_refused_elsewhere(tmp_path, option):
    path = write(tmp_path, zero_optimization={"stage": 2} | option)
    with pytest.raises(ValueError, match=f"sets {next(iter(option))}, which needs ZeRO stage 3"):
        load_ds_config(path, facts())


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offloads in part"),
        ({"offload_optimizer": {"device": "cpu", "pipeline_read": True}}, "sets pipeline_read"),
    ],
)
def test_offloads_that_checkpoints_can_not_read_are_refused(tmp_path, offload, message):
    path = write(tmp_path, zero_optimization={"stage": 3} | offload)
    with pytest.raises(ValueError, match=message):
        load_ds_config(path, facts())


def test_groups_that_do_not_divide_the_processes_are_refused(tmp_path):
    path = write(tmp_path, zero_optimization={"stage": 3, "zero_hpz_partition_size": 8})
    with pytest.raises(ValueError, match="of which the 1 in all are a multiple; got 8"):
        load_ds_config(path, facts())


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("zero_optimisation", "zero_optimization"), ("gradient_cliping", "gradient_clipping")],
)
def test_misspelt_keys_are_refused_with_a_suggestion(tmp_path, key, suggestion):
    with pytest.raises(ValueError, match=f"no key '{key}'; did you mean '{suggestion}'"):
        load_ds_config(write(tmp_path, **{key: 1}), facts())


def test_two_different_values_for_one_fact_are_refused_naming_both(tmp_path):
    with pytest.raises(ValueError, match="train_batch_size = 32, but --train_batch_size says 64"):
        load_ds_config(write(tmp_path, train_batch_size=32), facts())
    with pytest.raises(ValueError, match=r"gradient_clipping = 1.0, but --max_grad_norm says 0.5"):
        load_ds_config(write(tmp_path, gradient_clipping=1.0), facts(max_grad_norm=0.5))


def test_equal_values_on_both_sides_are_fine(tmp_path):
    config = load_ds_config(write(tmp_path, train_batch_size=64, gradient_clipping=0.5), facts())
    assert config["gradient_clipping"] == 0.5


def test_a_shipped_optimizer_gets_the_recipe(tmp_path):
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    optimizer = {"type": "AdamW", "params": params | {"torch_adam": True}}
    config = load_ds_config(write(tmp_path, optimizer=optimizer), facts())
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.999]


def test_a_shipped_optimizer_without_params_gets_the_recipe(tmp_path):
    """Else its class would decide: a learning rate of 1e-3 whatever the flags say."""
    config = load_ds_config(write(tmp_path, optimizer={"type": "AdamW"}), facts())
    params = config["optimizer"]["params"]
    assert params == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-6}
    config = load_ds_config(write(tmp_path, optimizer={"type": "SGD"}), facts())
    assert config["optimizer"]["params"] == {"lr": 1e-3}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({}, "optimizer.type must be a name"),
        ({"type": 3}, "optimizer.type must be a name"),
        ({"type": "AdamW", "params": [1]}, "optimizer.params must be a JSON object"),
        ({"type": "Foo"}, "must be AdamW, Adam or an optimizer of torch.optim; got 'Foo'"),
        ({"type": "OneBitAdam"}, "must be AdamW, Adam or an optimizer of torch.optim"),
        ({"type": "Lamb"}, "Lamb of DeepSpeed has never been tried"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1.0}}, "has 'max_grad_norm', which"),
        ({"type": "AdamW", "params": {"torch_adam": True, "foo": 1}}, "refuses .*'foo'"),
        ({"type": "SGD", "params": {"betas": "auto"}}, "torch's SGD refuses .*'betas'"),
        ({"type": "SparseAdam"}, "SparseAdam refuses to start: .* dense gradients"),
        ({"type": "LBFGS"}, "LBFGS refuses to start"),
    ],
)
def test_an_optimizer_that_would_not_start_is_refused(tmp_path, optimizer, message):
    with pytest.raises(ValueError, match=message):
        load_ds_config(write(tmp_path, optimizer=optimizer), facts())


@pytest.mark.parametrize("name", ["AdamW", "adam", "NAdam", "SGD", "Adagrad"])
def test_an_optimizer_that_would_start_is_taken(tmp_path, name):
    load_ds_config(write(tmp_path, optimizer={"type": name}), facts())


@pytest.mark.parametrize("old", ["cpu_offload_param", "cpu_offload_params"])
def test_the_offload_switches_of_old_mean_what_they_are_called_today(tmp_path, old):
    zero = {"stage": 3, "cpu_offload": True, "cpu_offload_use_pin_memory": True, old: True}
    config = load_ds_config(write(tmp_path, zero_optimization=zero), facts())
    pinned = {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": pinned,
        "offload_param": pinned,
    }
    assert (offload_device(config, "optimizer"), offload_device(config, "param")) == ("cpu", "cpu")
    config = load_ds_config(write(tmp_path, zero_optimization={"cpu_offload": False}), facts())
    assert config["zero_optimization"] == {}


def test_an_offload_by_two_names_is_refused(tmp_path):
    zero = {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(ValueError, match="sets cpu_offload and offload_optimizer"):
        load_ds_config(write(tmp_path, zero_optimization=zero), facts())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"legacy_stage1": True}, "sets legacy_stage1 .* never been tried"),
        ({"zenflow": {"topk_ratio": 0.1}}, "sets zenflow .* never been tried"),
        ({"mics_shard_size": 2}, "MiCS"),
    ],
)
def test_options_that_would_not_start_are_refused(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        load_ds_config(write(tmp_path, zero_optimization={"stage": 2} | option), facts())


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("gradient_clipping", "1", "a number, 0 for none"),
        ("gradient_clipping", None, "a number, 0 for none"),
        ("gradient_clipping", -1, "a number, 0 for none"),
        ("gradient_predivide_factor", 0, "a number over 0"),
        ("steps_per_print", 0, "a whole number over 0"),
        ("steps_per_print", "a", "a whole number over 0"),
        ("prescale_gradients", "x", "true or false"),
        ("data_types", [], "a JSON object"),
        ("data_types", {"grad_accum_dtype": "bf16"}, "fp32 where gradients are fp32"),
        ("data_types", {"grad_accum_dtype": "foo"}, "fp32 where gradients are fp32"),
        ("torch_autocast", {"enabled": True, "lower_precision_safe_modules": ["os.x"]}, "names as"),
        ("zero_optimization", {"stage": 3, "zero_hpz_partition_size": 0}, "the processes of one"),
    ],
)
def test_values_that_would_end_the_first_step_are_refused(tmp_path, name, value, rule):
    with pytest.raises(ValueError, match=f"must be {rule}"):
        load_ds_config(write(tmp_path, **{name: value}), facts())


def said(tmp_path: Path, **config) -> str:
    path = write(tmp_path, **config)
    return "\n".join(remarks(path, load_ds_config(path, facts())))


def test_what_is_said_without_effect_is_said(tmp_path):
    clip = {"gradient_clipping": "auto"}
    for name, section in (
        ("activation_checkpointing", {"partition_activations": True}),
        ("fp16", {"loss_scale": 0, "initial_scale_power": 14}),
        ("aio", {"block_size": 1 << 20}),
        ("checkpoint", {"tag_validation": "Warn"}),
    ):
        assert f"without effect: {name} (" in said(tmp_path, **clip, **{name: section})
    offload = {"offload_optimizer": {"device": "cpu"}}
    found = said(tmp_path, **clip, zero_optimization=offload)
    assert "without effect: zero_optimization's offload_optimizer (its stage is 0)" in found
    early = {"stage": 2, "stage3_max_live_parameters": 5}
    found = said(tmp_path, **clip, zero_optimization=early)
    assert "zero_optimization's stage3_max_live_parameters (its stage is 2)" in found


def test_a_run_without_clipping_is_said(tmp_path):
    assert "gradients are not clipped" in said(tmp_path, bf16={"enabled": False})
    assert said(tmp_path, gradient_clipping=0.0) == ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_of_a_shipped_config_nothing_is_said(path, sixteen_processes):
    config = load_ds_config(path, replace(facts(), train_batch_size=1024), runs_here=False)
    assert not list(remarks(path, config))


def test_a_meaningless_auto_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'"auto" stands for nothing at flops_profiler.enabled'):
        load_ds_config(write(tmp_path, flops_profiler={"enabled": "auto"}), facts())


def test_what_the_command_line_owns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sets 'scheduler'; remove it and use --lr_schedule"):
        load_ds_config(write(tmp_path, scheduler={"type": "WarmupLR"}), facts())


def test_two_precisions_are_refused(tmp_path):
    path = write(tmp_path, bf16={"enabled": True}, fp16={"enabled": True})
    with pytest.raises(ValueError, match="enables bf16 and fp16; choose one"):
        load_ds_config(path, facts())


def test_half_precision_without_zero_is_refused(tmp_path):
    """DeepSpeed 0.19.8 trains it wrongly: 0.04 off in loss after four steps, ZeRO-1 is 0.002."""
    path = write(tmp_path, bf16={"enabled": True})
    with pytest.raises(ValueError, match="bf16 without ZeRO, where DeepSpeed updates wrongly"):
        load_ds_config(path, facts())


@pytest.mark.parametrize(
    "settings", [{"initial_scale_power": 25}, {"min_loss_scale": 2**17}, {"loss_scale": 2.0**25}]
)
def test_a_loss_scale_that_starts_beyond_its_bounds_is_refused(tmp_path, settings):
    path = write(tmp_path, fp16={"enabled": True} | settings, zero_optimization={"stage": 1})
    with pytest.raises(ValueError, match=r"must start between min_loss_scale = \d+ and 16,777,216"):
        load_ds_config(path, facts())


def test_autocast_in_half_precision_is_refused(tmp_path):
    path = write(tmp_path, torch_autocast={"enabled": True, "dtype": "float16"})
    with pytest.raises(ValueError, match="skipped updates DeepSpeed does not report"):
        load_ds_config(path, facts())


@pytest.mark.parametrize(
    "settings",
    [
        {
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "zero_optimization": {"stage": 1},
        },
        {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
    ],
)
def test_updates_by_bad_numbers_are_refused(tmp_path, settings):
    """Either switch lets DeepSpeed add gradients that are not finite to the weights."""
    with pytest.raises(ValueError, match="to false: gradients that are not finite"):
        load_ds_config(write(tmp_path, **settings), facts())


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
        ("fp16", "fp16_master_weights_and_grads"),
    ],
)
def test_masters_and_moments_stay_in_fp32(tmp_path, dtype, name):
    settings = {dtype: {"enabled": True, name: True}, "zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match=f"sets {dtype}.{name}: updates smaller than the last bit"):
        load_ds_config(write(tmp_path, **settings), facts())


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no DeepSpeed configuration at"):
        load_ds_config(tmp_path / "none.json", facts())
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_ds_config(tmp_path / "broken.json", facts())
