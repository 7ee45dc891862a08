"""A start from weights that exist: sizes, vocabulary and parameters, checked against the model.

Nothing is skipped in silence: what does not fit is an error, and the report lists the rest.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ds_deberta.data import DebertaTokenizer
from ds_deberta.distributed import logger
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD, generator_config
from ds_deberta.weights import (
    POSITIONS,
    WORDS,
    Role,
    Source,
    find_source,
    public_names,
    read_weights,
    sizes,
)

ADVICE = "Choose the model and the vocabulary that the file was made with (--model, --data_dir)."

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
# Where a name may be left over, and why. An encoder's name that is none of these is an error.
_UNUSED = (
    (r"lm_predictions\..*", "a masked language model's head"),
    (r"mask_predictions\..*", "a discriminator's head"),
    (r"(cls|pooler|classifier|qa_outputs)\..*", "another task's head"),
    (r"deberta\.embeddings\.position_ids", "a list of numbers"),
    (r"deberta\.embeddings\.position_embeddings\._?weight", "the input has no positions"),
    (r"deberta\.embeddings\.word_embeddings\._?weight", "the other form of the table is used"),
    (r"(?!deberta\.).*", "unknown"),
)
_HEADS = re.compile(r"(lm_predictions|mask_predictions)\..*")
# A merged table may differ from its parts by their rounding to fp16 and by one training step.
_MERGED_TOLERANCE = 1e-2


@dataclass(frozen=True)
class LoadReport:
    """What became of every name in `load_pretrained`."""

    source: str
    """Where the weights came from."""
    loaded: tuple[str, ...]
    """Parameters that were read."""
    fresh: Mapping[str, str]
    """Parameters that the source lacks, which keep their values -> why."""
    unused: Mapping[str, str]
    """Names of the source that the model has no place for -> why."""
    notes: tuple[str, ...] = ()
    """How values were made that the source does not hold as such."""

    def text(self, name: str) -> str:
        """Return the report as lines."""
        lines = [f"{name} from {self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"  {note}" for note in self.notes]
        for title, found in (("fresh", self.fresh), ("ignored", self.unused)):
            lines += [f"  {title} {line}" for line in _by_reason(found)] or [f"  {title}: none"]
        return "\n".join(lines)


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
    if source.files[0].is_dir():  # a checkpoint of ours
        assert source.config is not None
        return DebertaConfig.from_dict(source.config)
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
    for i, (ours, theirs) in enumerate(
        zip(
            tokenizer.pieces(range(tokenizer.num_tokens)),
            _pieces(source.vocab_file, tokenizer),
            strict=False,
        )
    ):
        if ours != theirs:
            raise ValueError(
                f"the vocabularies must be the same; id {i} is {ours!r} in {tokenizer.vocab_file} "
                f"and {theirs!r} in {source.vocab_file}. Prepare the data with the vocabulary of "
                "these weights (--vocab)."
            )


def load_pretrained(
    module: DebertaForMaskedLM | DebertaForRTD,
    source: Source | Path,
    *,
    role: Role | None = None,
    generator: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Read weights into a model; whatever does not fit is an error, and changes nothing.

    Args:
        module: not yet partitioned by DeepSpeed.
        source: see `find_source`.
        role: what the model is; a masked language model is a generator if not said.
        generator: the generator's weights, loaded before. A discriminator of gdes needs them where
            the source has the merged table only: then E_delta = E_D - E_G.
    """
    role = role or ("discriminator" if isinstance(module, DebertaForRTD) else "generator")
    source = source if isinstance(source, Source) else find_source(source, role)
    return _fit(module, source, _read(module, source, role), generator)


def start_generator(module: DebertaForMaskedLM, discriminator: Source) -> LoadReport:
    """Start a generator from a discriminator: the same embeddings, layers evenly out of its own."""
    weights = _read(module, discriminator, "discriminator")
    if f"{WORDS}weight" not in weights:
        raise ValueError(
            f"{discriminator.name} holds only the differences to its generator's embeddings; give "
            "that generator too (--init_generator)"
        )
    own = len(module.deberta.encoder.layer)
    stride = max(1, sizes(weights)["num_hidden_layers"] // own)
    kept: dict[str, Tensor] = {}
    unused: dict[str, str] = {}
    for name, weight in weights.items():
        layer = re.match(r"(deberta\.encoder\.layer\.)(\d+)(\..*)", name)
        number = int(layer[2]) if layer else 0
        if _HEADS.fullmatch(name):
            unused[name] = "a discriminator's file, not the generator's head"
        elif name.endswith("._weight"):
            unused[name] = "the other form of the table is used"
        elif number % stride or number // stride >= own:
            unused[name] = "a layer between those taken"
        else:
            kept[f"{layer[1]}{number // stride}{layer[3]}" if layer else name] = weight
    report = _fit(module, discriminator, kept, None)
    note = (
        "there is no --init_generator, so the generator starts from the discriminator: the same "
        f"embeddings, layers {', '.join(str(stride * i) for i in range(own))} and a fresh head"
    )
    return replace(report, unused={**report.unused, **unused}, notes=(note, *report.notes))


def _read(
    module: DebertaForMaskedLM | DebertaForRTD, source: Source, role: Role
) -> dict[str, Tensor]:
    heads = module.deberta.encoder.config.num_attention_heads
    return public_names(read_weights(source), role=role, num_heads=heads)


def _fit(
    module: DebertaForMaskedLM | DebertaForRTD,
    source: Source,
    weights: Mapping[str, Tensor],
    generator: Mapping[str, Tensor] | None,
) -> LoadReport:
    own = module.state_dict()
    values = {name: weights[name] for name in own if name in weights}
    used = set(values)
    notes: list[str] = []
    for table in (WORDS, POSITIONS):
        if f"{table}_weight" in own:
            merged = f"{table}weight"
            delta, note = _delta(source, table, weights, generator)
            if delta is not None:
                values[f"{table}_weight"] = delta
                used = used - {f"{table}_weight"} | {merged} if note else used
                notes += [note] if note else []
        elif f"{table}weight" in own.keys() - values.keys() and f"{table}_weight" in weights:
            if generator is None:
                continue
            total = _float(generator[f"{table}weight"]) + _float(weights[f"{table}_weight"])
            values[f"{table}weight"] = total
            used.add(f"{table}_weight")
            notes.append(f"{table}weight: the sum of the generator's and {table}_weight")
    for name, value in values.items():
        _check_shape(source, name, value.shape, own[name].shape)
    fresh = _fresh(module, source, own.keys() - values.keys())
    unused = _unused(source, weights.keys() - used)
    module.load_state_dict(values, strict=False)
    return LoadReport(source.name, tuple(values), fresh, unused, tuple(notes))


def _delta(
    source: Source,
    table: str,
    weights: Mapping[str, Tensor],
    generator: Mapping[str, Tensor] | None,
) -> tuple[Tensor | None, str | None]:
    """Return the discriminator's own part of a table, and how it was made if it was not stored."""
    merged, delta = weights.get(f"{table}weight"), weights.get(f"{table}_weight")
    if merged is None or (generator is None and delta is not None):
        return delta, None
    if generator is None:
        raise ValueError(
            f"{source.name} has only the sum {table}weight of the generator's and the "
            "discriminator's embeddings; to take it apart, load the generator too "
            "(--init_generator)"
        )
    shared = _float(generator[f"{table}weight"])
    _check_shape(source, f"{table}weight", merged.shape, shared.shape)
    if delta is not None:
        _check_shape(source, f"{table}_weight", delta.shape, shared.shape)
        if bool(((shared + _float(delta) - _float(merged)).abs() <= _MERGED_TOLERANCE).all()):
            return delta, None
    stored = " (the stored difference belongs to another generator)" if delta is not None else ""
    difference, rounding = split_sum(_float(merged), shared)
    exact = "exactly" if rounding == 0 else f"but for {rounding:.1e}"
    note = f"{table}_weight = {table}weight - the generator's{stored}; their sum is it {exact}"
    return difference, note


def split_sum(total: Tensor, part: Tensor) -> tuple[Tensor, float]:
    """Return the other part, such that both add up to `total` again, and how far they miss it.

    The rounded difference can miss by half a unit at a tie or at a power of two; one of its
    neighbours then hits, wherever `total` is the rounded sum of `part` and anything.
    """
    other = total - part
    for direction in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(other, torch.full_like(other, direction))
        is_better = (part + other != total) & (part + neighbour == total)
        other = torch.where(is_better, neighbour, other)
    return other, float((part + other - total).abs().max())


def _fresh(
    module: DebertaForMaskedLM | DebertaForRTD, source: Source, names: Iterable[str]
) -> dict[str, str]:
    # Other writers have no heads, and no position table where only the mask decoder reads it.
    may_lack = set() if module.deberta.position_biased_input else {f"{POSITIONS}weight"}
    fresh = dict.fromkeys(sorted(names), "not in the source")
    lacking = [name for name in fresh if not _HEADS.fullmatch(name) and name not in may_lack]
    _refuse(f"{source.name} lacks weights of the model", lacking)
    return fresh


def _unused(source: Source, names: Iterable[str]) -> dict[str, str]:
    reasons = {
        name: next((why for pattern, why in _UNUSED if re.fullmatch(pattern, name)), "")
        for name in sorted(names)
    }
    what = f"{source.name} has weights that the model lacks"
    _refuse(what, (name for name, why in reasons.items() if not why))
    return reasons


def _refuse(what: str, names: Iterable[str]) -> None:
    if found := list(names):
        shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        raise ValueError(f"{what}: {shown}. {ADVICE}")


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


def _check_shape(source: Source, name: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        is_vocabulary = name.startswith(WORDS) and found[1:] == expected[1:]
        raise ValueError(
            f"the {'vocabulary sizes' if is_vocabulary else 'shapes'} must be equal; {name} has "
            f"{list(found)} in {source.name} and {list(expected)} in the model. {ADVICE}"
        )


def _pieces(vocab_file: Path, tokenizer: DebertaTokenizer) -> list[str | None]:
    if vocab_file.suffix == ".json":
        by_piece = Tokenizer.from_file(str(vocab_file)).get_vocab()
        by_id = {i: piece for piece, i in by_piece.items()}
        return [by_id.get(i) for i in range(tokenizer.num_tokens)]
    theirs = DebertaTokenizer(vocab_file)
    if theirs.sha256 == tokenizer.sha256:
        return []
    pieces: list[str | None] = [*theirs.pieces(range(theirs.num_tokens))]
    return pieces + [None] * (tokenizer.num_tokens - theirs.num_tokens)


def _by_reason(names: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with all its names; layers are named once."""
    groups: dict[str, dict[str, None]] = {}
    for name, why in names.items():
        groups.setdefault(why, {})[re.sub(r"(\.layer\.\d+\.).*", r"\1*", name)] = None
    return [f"({why}): {', '.join(group)}" for why, group in groups.items()]


def _float(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32)
