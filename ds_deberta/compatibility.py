"""Compatibility of a run with the weights it starts from: architecture and vocabulary.

All of it is settled by configs, shapes and vocabularies, before any weight is read.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from tokenizers import Tokenizer

from ds_deberta.data import DebertaTokenizer, check_added_words
from ds_deberta.distributed import logger
from ds_deberta.model import DebertaConfig, generator_config
from ds_deberta.weights import ADVICE, Role, Source, public_names, read_weights, sizes

# Facts of a config that change what the same tensors compute.
_FACTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size_or_default",
    "hidden_act",
    "relative_attention",
    "pos_att_type",
    "position_span",
    "relative_reach",
    "share_att_key",
    "norm_rel_ebd",
    "position_biased_input",
    "layer_norm_eps",
    "conv_kernel_size",
    "conv_groups",
    "pad_token_id",
)


def fit_configs(
    configs: Mapping[str, DebertaConfig],
    sources: Mapping[Role, Source],
    tokenizer: DebertaTokenizer,
    *,
    takes_sizes: bool,
) -> dict[str, DebertaConfig]:
    """Check the architectures of a run against its sources, before any weight is read.

    Args:
        configs: by engine name.
        sources: by engine name; there may be none.
        tokenizer: of the data.
        takes_sizes: the sources say what the models are; else `configs` do.

    Raises:
        ValueError: config, tensors, model or vocabulary contradict each other.
    """
    fitted = dict(configs)
    order: tuple[Role, ...] = ("model", "discriminator", "generator")
    roles: list[Role] = [role for role in order if role in sources]
    for role in roles:
        source = sources[role]
        found = source_config(source, role, fitted[role])
        check_vocabulary(source, found, tokenizer)
        if takes_sizes and role == "model":
            fitted = {"model": found}
        elif takes_sizes and role == "discriminator":
            fitted = {"generator": generator_config(found), "discriminator": found}
        elif takes_sizes:
            layers = found.num_hidden_layers
            fitted[role] = replace(fitted[role], num_hidden_layers=layers)
        if role == roles[0]:  # the file knows how its table was padded
            fitted = {n: replace(c, vocab_size=found.vocab_size) for n, c in fitted.items()}
        _check_facts(source, found, fitted[role])
    return fitted


def source_config(source: Source, role: Role, like: DebertaConfig) -> DebertaConfig:
    """Return the architecture that a source's config and tensors describe.

    Args:
        source: of `find_source`.
        role: what it is to be.
        like: says the rest, where no config lies beside the tensors.
    """
    shapes = public_names(read_weights(source, shapes_only=True), role=role, num_heads=1)
    if role == "generator" and any(name.startswith("mask_predictions.") for name in shapes):
        raise ValueError(
            f"--init_generator must be a generator; {source.name} holds a discriminator. Leave it "
            "out where there is none: then the generator starts from the discriminator"
        )
    found = sizes(shapes)
    if "hidden_size" not in found:
        raise ValueError(
            f"{source.name} must hold the weights of a DeBERTa encoder; its tensors are "
            f"{', '.join(sorted(shapes)[:4])} ..."
        )
    if source.config is None:
        heads = {"num_attention_heads": max(1, found["hidden_size"] // like.head_size)}
        return DebertaConfig.from_dict(like.to_dict() | found | heads)
    values = dict(source.config)
    if strange := DebertaConfig.unknown_keys(values):
        logger.info("%s: ignored %s", source.config_file, ", ".join(strange))
    values = {name: value for name, value in values.items() if name not in strange}
    if values.get("model_type") == "deberta":  # v1, whose tensors become those of v2
        values["model_type"] = "deberta-v2"
    config = DebertaConfig.from_dict(values)
    said = config.to_dict()
    wrong = [
        f"{name} {said[name]}, not {size}" for name, size in found.items() if said[name] != size
    ]
    if wrong:
        raise ValueError(
            f"{source.config_file} must describe the tensors of {source.name}; it says "
            f"{'; '.join(wrong)}. Place the config that belongs to them there."
        )
    return config


def check_vocabulary(source: Source, config: DebertaConfig, tokenizer: DebertaTokenizer) -> None:
    """Check that every id of the data means to the source what it means to us.

    Raises:
        ValueError: it does not, or nothing can tell.
    """
    if config.vocab_size < tokenizer.num_tokens:
        raise ValueError(
            f"the weights must have a row for each id of the vocabulary; {source.name} has "
            f"{config.vocab_size} rows, {tokenizer.vocab_file} {tokenizer.num_tokens} ids. "
            "Prepare the data with the vocabulary of these weights (--vocab)."
        )
    if config.pad_token_id != tokenizer.special.pad:
        raise ValueError(
            f"pad_token_id must be {tokenizer.special.pad}, as in {tokenizer.vocab_file}; "
            f"{source.config_file} says {config.pad_token_id}. Use weights of that vocabulary."
        )
    if source.vocab_file is None:
        if config.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the vocabularies must be the same; {source.name} has {config.vocab_size} rows "
                f"and {tokenizer.vocab_file} makes {tokenizer.vocab_size}. If the data were "
                "prepared with its vocabulary, place that spm.model beside the weights."
            )
        return
    pieces = tokenizer.pieces(range(tokenizer.num_tokens))
    for i, (ours, theirs) in enumerate(
        zip_longest(pieces, _pieces(source.vocab_file), fillvalue=None)
    ):
        if ours != theirs:
            raise ValueError(
                f"the vocabularies must be the same; id {i} is {ours!r} in {tokenizer.vocab_file} "
                f"and {theirs!r} in {source.vocab_file}. Prepare the data with the vocabulary of "
                "these weights (--vocab)."
            )
    check_added_words(source.vocab_file, tokenizer)


def _check_facts(source: Source, found: DebertaConfig, model: DebertaConfig) -> None:
    different = [
        f"{name} {getattr(found, name)}, not {getattr(model, name)}"
        for name in _FACTS
        if getattr(found, name) != getattr(model, name)
    ]
    if different:
        raise ValueError(
            f"{source.name} does not fit the model: it has {'; '.join(different)}. {ADVICE}"
        )


def _pieces(vocab_file: Path) -> list[str | None]:
    if vocab_file.suffix == ".json":
        by_piece = Tokenizer.from_file(str(vocab_file)).get_vocab()
        by_id: dict[int, str] = {i: piece for piece, i in by_piece.items()}
        return [by_id.get(i) for i in range(1 + max(by_id))]
    theirs = DebertaTokenizer(vocab_file)
    return [*theirs.pieces(range(theirs.num_tokens))]
