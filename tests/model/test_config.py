"""Reading and checking a model's config."""

from dataclasses import replace

import pytest

from ds_deberta.model import DebertaConfig

# As published for deberta-v3-base.
PUBLIC = {
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 0,
    "vocab_size": 128100,
}
V3_BASE = DebertaConfig(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
)


def test_a_public_config_is_read():
    assert DebertaConfig.from_dict(PUBLIC) == V3_BASE


def test_a_config_of_the_original_is_read():
    original = {name: value for name, value in PUBLIC.items() if name != "model_type"}
    assert (
        DebertaConfig.from_dict(original | {"attention_head_size": 64, "padding_idx": 0}) == V3_BASE
    )


def test_writing_and_reading_gives_the_same_config():
    for config in (V3_BASE, replace(V3_BASE, pos_att_type=("c2p",), conv_kernel_size=5)):
        assert DebertaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("written", "terms"),
    [
        ("p2c|c2p", ("p2c", "c2p")),
        ("c2p|p2c", ("p2c", "c2p")),
        (["c2p", "p2c"], ("p2c", "c2p")),
        (" C2P ", ("c2p",)),
        ("none", ()),
        (["none"], ()),
        ([], ()),
        (None, ()),
    ],
)
def test_position_terms_are_read_in_every_spelling(written, terms: tuple[str, ...]):
    assert DebertaConfig.from_dict(PUBLIC | {"pos_att_type": written}).pos_att_type == terms


def test_what_a_file_leaves_out_means_what_it_means_to_transformers():
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    config = DebertaConfig.from_dict({n: PUBLIC[n] for n in sizes} | {"relative_attention": False})
    assert not config.share_att_key
    assert config.position_biased_input
    assert config.pos_att_type == ()
    assert config.position_buckets == -1
    assert config.norm_rel_ebd == "none"


def test_the_feed_forward_is_four_times_as_wide_unless_told():
    config = DebertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert config.intermediate_size_or_default == 32
    assert config.to_dict()["intermediate_size"] == 32
    assert replace(config, intermediate_size=20).intermediate_size_or_default == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary": True, "experts": 4}, "unknown keys in a model config: rotary, experts"),
        ({"type_vocab_size": 2}, "type_vocab_size must be 0; got 2"),
        ({"embedding_size": 128}, "embedding_size must be 768; got 128"),
        ({"attention_head_size": 32}, "attention_head_size must be 64; got 32"),
        ({"padding_idx": 1}, "padding_idx must be 0; got 1"),
        ({"model_type": "deberta"}, "model_type must be 'deberta-v2'; got 'deberta'"),
        ({"num_attention_heads": 7}, "num_attention_heads must be a divisor of hidden_size 768"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1; got 0"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\); got 1.0"),
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, relu, tanh; got 'swish'"),
        ({"pos_att_type": "p2p"}, "pos_att_type must be made of c2p and p2c"),
        ({"pos_att_type": ["c2p", "c2p"]}, "pos_att_type must be made of c2p and p2c, each once"),
        ({"relative_attention": False}, "pos_att_type must be none without relative_attention"),
        ({"norm_rel_ebd": "batch"}, "norm_rel_ebd must be one of layer_norm, none; got 'batch'"),
        ({"position_buckets": 1}, "position_buckets must be 0 or at least 2"),
        ({"conv_kernel_size": 4}, "conv_kernel_size must be 0 or odd; got 4"),
        ({"conv_groups": 5}, "conv_groups must be a divisor of hidden_size 768; got 5"),
        ({"pad_token_id": 128100}, "pad_token_id must be below vocab_size 128100"),
    ],
)
def test_what_cannot_be_built_is_an_error(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DebertaConfig.from_dict(PUBLIC | change)


def test_a_config_must_say_what_it_is():
    values = {name: value for name, value in PUBLIC.items() if name != "relative_attention"}
    with pytest.raises(ValueError, match="must give relative_attention"):
        DebertaConfig.from_dict(values)
