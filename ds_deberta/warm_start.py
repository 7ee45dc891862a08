"""A start from weights that exist: the parameters of a source, fitted to a model.

Nothing is skipped in silence: what does not fit is an error, and the report lists the rest.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ds_deberta.distributed import logger
from ds_deberta.model import DebertaForMaskedLM, DebertaForRTD
from ds_deberta.weights import (
    ADVICE,
    POSITIONS,
    WORDS,
    Role,
    Source,
    find_source,
    public_names,
    read_weights,
    sizes,
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


def load_initial(
    models: dict[str, DebertaForMaskedLM | DebertaForRTD], sources: Mapping[Role, Source]
) -> None:
    """Fill the models from their sources, the generator first: the discriminator builds on it."""
    for role in ("model", "generator", "discriminator"):
        if role in sources:
            generator = models["generator"].state_dict() if role == "discriminator" else None
            report = load_pretrained(models[role], sources[role], role=role, generator=generator)
        elif role == "generator" and "discriminator" in sources:
            module = models[role]
            assert isinstance(module, DebertaForMaskedLM)
            report = start_generator(module, sources["discriminator"])
        else:
            if sources and role in models:
                logger.info("%s: fresh, for there is no --init_%s", role, role)
            continue
        logger.info(report.text(role))


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
    misses = (part + other != total).nonzero(as_tuple=True)
    for direction in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(other[misses], torch.tensor(direction))
        is_hit = part[misses] + neighbour == total[misses]
        other[misses] = torch.where(is_hit, neighbour, other[misses])
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


def _check_shape(source: Source, name: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        is_vocabulary = name.startswith(WORDS) and found[1:] == expected[1:]
        raise ValueError(
            f"the {'vocabulary sizes' if is_vocabulary else 'shapes'} must be equal; {name} has "
            f"{list(found)} in {source.name} and {list(expected)} in the model. {ADVICE}"
        )


def _by_reason(names: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with all its names; layers are named once."""
    groups: dict[str, dict[str, None]] = {}
    for name, why in names.items():
        groups.setdefault(why, {})[re.sub(r"(\.layer\.\d+\.).*", r"\1*", name)] = None
    return [f"({why}): {', '.join(group)}" for why, group in groups.items()]


def _float(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32)
