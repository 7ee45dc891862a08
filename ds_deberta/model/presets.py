"""The named models."""

import math
from dataclasses import replace
from pathlib import Path

from ds_deberta.json_file import read_object
from ds_deberta.model.config import DebertaConfig


def _relative(hidden_size: int, num_hidden_layers: int) -> DebertaConfig:
    """Return a model with heads of 64, c2p and p2c attention and no positions in the input."""
    return DebertaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
    )


def _scaled(config: DebertaConfig) -> DebertaConfig:
    """Return a narrow model whose initial weights are as much wider than a base model's.

    At 0.02 attention adds 7% of the residual's norm to a base model, 1% to one that is 128 wide:
    a high learning rate destroys that path before it carries anything, and the model learns how
    frequent tokens are, no more. `benchmarks/learning_start.py` shows it.
    """
    scaled = config.initializer_range * math.sqrt(768 / config.hidden_size)
    return replace(config, initializer_range=round(scaled, 3))


_NANO = replace(
    _scaled(_relative(128, 2)), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)

MODELS: dict[str, DebertaConfig] = {
    "bert-base": replace(
        _relative(768, 12), relative_attention=False, pos_att_type=(), position_biased_input=True
    ),
    "deberta-nano": _NANO,
    "deberta-base": _relative(768, 12),
    "xlarge-v2": replace(_relative(1536, 24), conv_kernel_size=3, conv_act="gelu"),
    "xxlarge-v2": replace(_relative(1536, 48), conv_kernel_size=3, conv_act="gelu"),
    "deberta-v3-nano": _NANO,
    "deberta-v3-xsmall": _scaled(_relative(256, 12)),
    "deberta-v3-xsmall-384": _relative(384, 12),
    "deberta-v3-small": _relative(768, 6),
    "deberta-v3-base": _relative(768, 12),
    "deberta-v3-large": _relative(1024, 24),
}
"""Architectures by name. For replaced token detection this is the discriminator."""

CONTINUED = {
    # The public XSmall checkpoint is 384 wide.
    "deberta-v3-xsmall-continue": "deberta-v3-xsmall-384",
    "deberta-v3-small-continue": "deberta-v3-small",
    "deberta-v3-base-continue": "deberta-v3-base",
    "deberta-v3-large-continue": "deberta-v3-large",
}
"""Recipes that start from a checkpoint, and the architecture that each one continues."""


def generator_config(discriminator: DebertaConfig) -> DebertaConfig:
    """Return the generator that trains with a discriminator: as wide, half as deep."""
    # Two layers at least: the enhanced mask decoder reads the one before the last.
    return replace(discriminator, num_hidden_layers=max(2, discriminator.num_hidden_layers // 2))


def load_model_config(name_or_path: str | Path) -> DebertaConfig:
    """Return a preset, a continued preset, or what a config.json (or its folder) says.

    A file with a discriminator and a generator, as the original's, gives the discriminator; its
    generator must be the one that `generator_config` makes.
    """
    name = str(name_or_path)
    name = CONTINUED.get(name, name)
    if name in MODELS:
        return MODELS[name]
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        names = ", ".join([*MODELS, *CONTINUED])
        raise ValueError(
            f"unknown model {name!r}; choose one of {names} or give a path to a config.json"
        )
    values = read_object(path)
    if not all(isinstance(values.get(part, {}), dict) for part in ("discriminator", "generator")):
        raise ValueError(f"{path} must hold a JSON object of an architecture's sizes")
    if "discriminator" not in values:
        return DebertaConfig.from_dict(values)
    discriminator = DebertaConfig.from_dict(values["discriminator"])
    generator = DebertaConfig.from_dict(values.get("generator", values["discriminator"]))
    if "generator" in values and generator != generator_config(discriminator):
        raise ValueError(
            f"the generator in {path} must be the discriminator at half its depth; it is not. "
            "Remove it from the file, or make it so."
        )
    return discriminator
