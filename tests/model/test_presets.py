"""Presets against the numbers of the original system."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_deberta.model import (
    MODELS,
    DebertaForMaskedLM,
    DebertaForRTD,
    generator_config,
    load_model_config,
)

# layers, hidden, heads, feed-forward
SIZES = {
    "bert-base": (12, 768, 12, 3072),
    "deberta-nano": (2, 128, 2, 512),
    "deberta-base": (12, 768, 12, 3072),
    "xlarge-v2": (24, 1536, 24, 6144),
    "xxlarge-v2": (48, 1536, 24, 6144),
    "deberta-v3-nano": (2, 128, 2, 512),
    "deberta-v3-xsmall": (12, 256, 4, 1024),
    "deberta-v3-xsmall-384": (12, 384, 6, 1536),
    "deberta-v3-small": (6, 768, 12, 3072),
    "deberta-v3-base": (12, 768, 12, 3072),
    "deberta-v3-large": (24, 1024, 16, 4096),
}
# Counted on the original: generator and its encoder, discriminator (gdes) and its encoder.
RTD_PARAMETERS = {
    "deberta-v3-xsmall-384": (60_508_644, 10_844_160, 71_027_713, 21_490_944),
    "deberta-v3-small": (121_154_148, 21_658_368, 142_290_433, 42_921_984),
    "deberta-v3-base": (142_417_764, 42_921_984, 184_817_665, 85_449_216),
    "deberta-v3-large": (284_561_508, 151_681_024, 435_589_121, 302_835_712),
}
MLM_PARAMETERS = {
    "bert-base": 184_551_780,
    "deberta-base": 184_944_996,
    "xlarge-v2": 887_871_588,
    "xxlarge-v2": 1_567_828_068,
}
EMBEDDINGS = """
    deberta.embeddings.LayerNorm.weight 384
    deberta.embeddings.LayerNorm.bias 384
"""
LAYER = """
    attention.self.query_proj.weight 384 384
    attention.self.query_proj.bias 384
    attention.self.key_proj.weight 384 384
    attention.self.key_proj.bias 384
    attention.self.value_proj.weight 384 384
    attention.self.value_proj.bias 384
    attention.output.dense.weight 384 384
    attention.output.dense.bias 384
    attention.output.LayerNorm.weight 384
    attention.output.LayerNorm.bias 384
    intermediate.dense.weight 1536 384
    intermediate.dense.bias 1536
    output.dense.weight 384 1536
    output.dense.bias 384
    output.LayerNorm.weight 384
    output.LayerNorm.bias 384
"""
RELATIVE = """
    deberta.encoder.rel_embeddings.weight 512 384
    deberta.encoder.LayerNorm.weight 384
    deberta.encoder.LayerNorm.bias 384
"""
LM_HEAD = """
    deberta.embeddings.word_embeddings.weight 128100 384
    deberta.embeddings.position_embeddings.weight 512 384
    lm_predictions.lm_head.bias 128100
    lm_predictions.lm_head.dense.weight 384 384
    lm_predictions.lm_head.dense.bias 384
    lm_predictions.lm_head.LayerNorm.weight 384
    lm_predictions.lm_head.LayerNorm.bias 384
"""
RTD_HEAD = """
    deberta.embeddings.word_embeddings._weight 128100 384
    mask_predictions.dense.weight 384 384
    mask_predictions.dense.bias 384
    mask_predictions.LayerNorm.weight 384
    mask_predictions.LayerNorm.bias 384
    mask_predictions.classifier.weight 1 384
    mask_predictions.classifier.bias 1
"""


def build(kind: type, config, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(config, **options)


def count(model: torch.nn.Module, prefix: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))


def public_keys(head: str, layers: int) -> dict[str, tuple[int, ...]]:
    lines = (EMBEDDINGS + RELATIVE + head).split("\n")
    for number in range(layers):
        lines += [
            f"deberta.encoder.layer.{number}.{key.strip()}" for key in LAYER.split("\n") if key
        ]
    parts = [line.split() for line in lines if len(line.split()) > 1]
    return {name: tuple(map(int, shape)) for name, *shape in parts}


def test_the_named_models_are_these():
    assert list(MODELS) == list(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_sizes_of_the_original(name: str):
    config = MODELS[name]
    sizes = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
    )
    assert sizes == SIZES[name]
    assert config.head_size == 64
    assert config.hidden_act == "gelu"
    # Narrower than any published model: wider weights, by the root of the width.
    scaled = {"deberta-nano": 0.049, "deberta-v3-nano": 0.049, "deberta-v3-xsmall": 0.035}
    assert config.initializer_range == scaled.get(name, 0.02)
    assert config.max_position_embeddings == 512
    assert config.position_buckets == 256
    assert config.max_relative_positions == -1
    assert config.norm_rel_ebd == "layer_norm"
    assert config.share_att_key
    assert config.layer_norm_eps == 1e-7
    assert config.type_vocab_size == 0
    assert config.vocab_size == 128100
    assert config.pad_token_id == 0
    dropout = 0.0 if name.endswith("nano") else 0.1
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == dropout
    plain = name == "bert-base"
    assert config.relative_attention is not plain
    assert config.position_biased_input is plain
    assert config.pos_att_type == (() if plain else ("p2c", "c2p"))
    conv = (3, "gelu") if name.startswith("x") else (0, "tanh")
    assert (config.conv_kernel_size, config.conv_act, config.conv_groups) == (*conv, 1)


@pytest.mark.parametrize("name", RTD_PARAMETERS)
def test_rtd_models_have_the_parameters_of_the_original(name: str):
    config = MODELS[name]
    generator = build(DebertaForMaskedLM, generator_config(config))
    discriminator = build(DebertaForRTD, config, embedding_sharing="gdes")
    # The original's discriminator has a table of position differences as well, which nothing reads.
    unread = config.max_position_embeddings * config.hidden_size
    assert RTD_PARAMETERS[name] == (
        count(generator),
        count(generator, "deberta.encoder."),
        count(discriminator) + unread,
        count(discriminator, "deberta.encoder."),
    )


@pytest.mark.parametrize("name", MLM_PARAMETERS)
def test_mlm_models_have_the_parameters_of_the_original(name: str):
    assert count(build(DebertaForMaskedLM, MODELS[name])) == MLM_PARAMETERS[name]


def test_keys_and_shapes_are_those_of_the_public_xsmall_checkpoint():
    config = MODELS["deberta-v3-xsmall-384"]
    generator = build(DebertaForMaskedLM, generator_config(config)).state_dict()
    discriminator = build(DebertaForRTD, config, embedding_sharing="gdes").state_dict()
    assert {n: tuple(v.shape) for n, v in generator.items()} == public_keys(LM_HEAD, 6)
    assert {n: tuple(v.shape) for n, v in discriminator.items()} == public_keys(RTD_HEAD, 12)
    assert len(generator) == 108
    assert len(discriminator) == 205 - 1  # the unread position differences


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("deberta-v3-nano", 2),
        ("deberta-v3-xsmall", 6),
        ("deberta-v3-xsmall-384", 6),
        ("deberta-v3-small", 3),
        ("deberta-v3-base", 6),
        ("deberta-v3-large", 12),
    ],
)
def test_the_generator_is_as_wide_and_half_as_deep(name: str, layers: int):
    config = MODELS[name]
    assert generator_config(config) == replace(config, num_hidden_layers=layers)


def test_continued_recipes_are_no_other_architectures():
    assert load_model_config("deberta-v3-xsmall-continue") is MODELS["deberta-v3-xsmall-384"]
    for size in ("small", "base", "large"):
        name = f"deberta-v3-{size}"
        assert load_model_config(f"{name}-continue") is load_model_config(name) is MODELS[name]


def test_a_config_file_or_its_folder_is_a_model(tmp_path: Path):
    config = replace(MODELS["deberta-v3-nano"], vocab_size=77)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_model_config(tmp_path) == config
    assert load_model_config(str(tmp_path / "config.json")) == config


def test_a_file_with_two_models_gives_the_discriminator(tmp_path: Path):
    config = MODELS["deberta-v3-small"]
    pair = {
        "embedding_sharing": "gdes",
        "discriminator": config.to_dict(),
        "generator": generator_config(config).to_dict(),
    }
    file = tmp_path / "rtd_small.json"
    file.write_text(json.dumps(pair))
    assert load_model_config(file) == config
    pair["generator"]["num_hidden_layers"] = 4
    file.write_text(json.dumps(pair))
    with pytest.raises(ValueError, match="must be the discriminator at half its depth"):
        load_model_config(file)


def test_an_unknown_model_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'deberta-v4'; choose one of bert-base, "):
        load_model_config("deberta-v4")
