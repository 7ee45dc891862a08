"""The architecture of a model, under the names of a Hugging Face config.json."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}
POSITION_TERMS = ("p2c", "c2p")
NORM_REL_EBD = ("layer_norm", "none")

# What a config.json that does not name the key means, in Hugging Face's code and in the original's.
MEANING_OF_ABSENT: dict[str, Any] = {
    "norm_rel_ebd": "none",
    "pos_att_type": None,
    "position_biased_input": True,
    "position_buckets": -1,
    "share_att_key": False,
}
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "relative_attention")
# Keys of a Hugging Face config.json that do not describe the encoder.
NOT_ARCHITECTURE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cls_dropout",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "legacy",
        "output_attentions",
        "output_hidden_states",
        "pooler_dropout",
        "pooler_hidden_act",
        "pooler_hidden_size",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# Keys with one right value, which follows from the others.
CHECKED = frozenset(
    {"attention_head_size", "embedding_size", "model_type", "padding_idx", "tie_word_embeddings"}
)


@dataclass(frozen=True, kw_only=True)
class DebertaConfig:
    """A DeBERTa-v2/v3 encoder; the defaults are those of the v3 models."""

    vocab_size: int = 128100
    """Rows of the word embeddings."""
    hidden_size: int
    """Width of the encoder."""
    num_hidden_layers: int
    """Layers of the encoder."""
    num_attention_heads: int
    """Heads of each attention; must divide hidden_size."""
    intermediate_size: int | None = None
    """Width of the feed-forward; None: four times hidden_size."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward and of the heads."""
    hidden_dropout_prob: float = 0.1
    """Dropout of the embeddings, of each block's output and of the relative embeddings."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout of the attention probabilities."""
    max_position_embeddings: int = 512
    """Longest sequence, and rows of the absolute position embeddings."""
    relative_attention: bool = True
    """Attend by relative position; off: plain attention."""
    pos_att_type: tuple[str, ...] = POSITION_TERMS
    """Position terms of the scores: c2p, p2c, both or none."""
    position_buckets: int = 256
    """Logarithmic buckets for each sign of the distance; <= 0: one row for each distance."""
    max_relative_positions: int = -1
    """Distances from here on are alike; < 1: max_position_embeddings."""
    share_att_key: bool = True
    """Project relative embeddings with the content's own query and key projections."""
    norm_rel_ebd: str = "layer_norm"
    """layer_norm: normalize the relative embeddings; none: use them as they are."""
    position_biased_input: bool = False
    """Add absolute positions to the input; off: they enter at the enhanced mask decoder only."""
    layer_norm_eps: float = 1e-7
    """Epsilon of every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    conv_kernel_size: int = 0
    """Width of the convolution beside the first layer; 0: none."""
    conv_act: str = "tanh"
    """Activation of the convolution."""
    conv_groups: int = 1
    """Groups of the convolution."""
    type_vocab_size: int = 0
    """Token types; none are supported."""
    pad_token_id: int = 0
    """Id of the padding."""

    def __post_init__(self) -> None:
        """Check what a user can get wrong."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "conv_groups",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)", getattr(self, name))
        for name in ("hidden_act", "conv_act"):
            choices = f"one of {', '.join(ACTIVATIONS)}"
            _require(getattr(self, name) in ACTIVATIONS, name, choices, repr(getattr(self, name)))
        self._check_relative()
        for name, divisor in (
            ("num_attention_heads", self.num_attention_heads),
            ("conv_groups", self.conv_groups),
        ):
            rule = f"a divisor of hidden_size {self.hidden_size}"
            _require(self.hidden_size % divisor == 0, name, rule, divisor)
        kernel = self.conv_kernel_size
        _require(kernel == 0 or kernel % 2 == 1, "conv_kernel_size", "0 or odd", kernel)
        _require(self.type_vocab_size == 0, "type_vocab_size", "0", self.type_vocab_size)
        rule = f"below vocab_size {self.vocab_size}"
        _require(0 <= self.pad_token_id < self.vocab_size, "pad_token_id", rule, self.pad_token_id)

    def _check_relative(self) -> None:
        terms = self.pos_att_type
        known = set(terms) <= set(POSITION_TERMS) and len(set(terms)) == len(terms)
        _require(known, "pos_att_type", "made of c2p and p2c, each once", terms)
        alone = self.relative_attention or not terms
        _require(alone, "pos_att_type", "none without relative_attention", terms)
        choices = f"one of {', '.join(NORM_REL_EBD)}"
        _require(
            self.norm_rel_ebd in NORM_REL_EBD, "norm_rel_ebd", choices, repr(self.norm_rel_ebd)
        )
        _require(self.position_buckets != 1, "position_buckets", "0 or at least 2", 1)

    @property
    def intermediate_size_or_default(self) -> int:
        """Width of the feed-forward."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def relative_reach(self) -> int:
        """Distances from here on are alike."""
        reach = self.max_relative_positions
        return reach if reach > 0 else self.max_position_embeddings

    @property
    def position_span(self) -> int:
        """Half the rows of the relative embeddings."""
        return self.position_buckets if self.position_buckets > 0 else self.relative_reach

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` and a Hugging Face config.json understand."""
        values = asdict(self)
        return values | {
            "intermediate_size": self.intermediate_size_or_default,
            "pos_att_type": list(self.pos_att_type),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DebertaConfig":
        """Read a config.json: ours, Hugging Face's or one half of the original's.

        A key that the file leaves out means what it means to Hugging Face and the original, which
        is not always our default. A key that nobody here understands is an error.
        """
        missing = [name for name in REQUIRED if name not in values]
        if missing:
            raise ValueError(f"a model config must give {', '.join(missing)}; add what is missing")
        known = {field.name for field in fields(cls)}
        given = {name: values[name] for name in known & values.keys()}
        given = MEANING_OF_ABSENT | given
        given["pos_att_type"] = _parse_terms(given["pos_att_type"])
        hints = get_type_hints(cls)
        for name, value in given.items():
            kinds = get_args(hints[name]) or (hints[name],)
            fits = name == "pos_att_type" or _is_of(value, kinds)
            _require(fits, name, kinds[0].__name__, repr(value))
        config = cls(**given)
        fixed: dict[str, Any] = {
            "attention_head_size": config.head_size,
            "embedding_size": config.hidden_size,
            "model_type": "deberta-v2",
            "padding_idx": config.pad_token_id,
            "tie_word_embeddings": True,
        }
        if unknown := cls.unknown_keys(values):
            raise ValueError(f"unknown keys in a model config: {', '.join(unknown)}. Remove them.")
        for name, value in fixed.items():
            _require(values.get(name, value) == value, name, repr(value), repr(values.get(name)))
        return config

    @classmethod
    def unknown_keys(cls, values: Mapping[str, Any]) -> list[str]:
        """Name what `from_dict` would refuse because nobody here understands it."""
        known = {field.name for field in fields(cls)} | NOT_ARCHITECTURE | CHECKED
        return [name for name in values if name not in known]


def _is_of(value: object, kinds: tuple[type, ...]) -> bool:
    """True for a value of these types, as JSON has them: a whole number may stand for a float."""
    if isinstance(value, bool):
        return bool in kinds
    if float in kinds:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kinds)


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}; got {got}. Change it in the model's config.")


def _parse_terms(terms: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """Read pos_att_type as 'p2c|c2p', a list, 'none' or None; always in one order."""
    names = terms.split("|") if isinstance(terms, str) else terms or ()
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    _require(is_list, "pos_att_type", "made of c2p and p2c, each once", repr(terms))
    names = [name.strip().lower() for name in names if name.strip().lower() != "none"]
    return tuple(sorted(names, reverse=True))
