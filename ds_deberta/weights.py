"""Weights of any public layout, read from files under the names of our parameters.

A source is a file, a folder, a checkpoint of ours, or the name of a model on the hub. Reading runs
no code: of a pickle only tensors are taken, and one that holds more is refused.
"""

import functools
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_deberta.checkpoint import check_files, read_description
from ds_deberta.json_file import read_object
from ds_deberta.model_state import WEIGHTS

Role = Literal["generator", "discriminator", "model"]

WORDS = "deberta.embeddings.word_embeddings."
POSITIONS = "deberta.embeddings.position_embeddings."
HEADS_FILE = "heads.safetensors"
GENERATOR_FILE = "pytorch_model.generator.bin"  # beside the discriminator's, in public folders
WEIGHT_FILES = (  # the first that a folder has
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "pytorch.model-*.bin",  # the original's own checkpoints, of which the newest is taken
)
CONFIG_FILES = ("config.json", "model_config.json")
VOCABULARY_FILES = ("spm.model", "tokenizer.json")
ADVICE = "Choose the model and the vocabulary that the file was made with (--model, --data_dir)."
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

RENAMES = (
    # Wrappers around a model.
    (r"^(_orig_mod\.|module\.)+", ""),
    # Older and bare encoders.
    (r"^bert\.", "deberta."),
    (r"^(?=(embeddings|encoder)\.)", "deberta."),
    # DeBERTa v1; its in_proj is cut in three by `_split_in_proj`.
    (r"\.self\.q_bias$", ".self.query_proj.bias"),
    (r"\.self\.v_bias$", ".self.value_proj.bias"),
    (r"\.self\.pos_proj\.", ".self.pos_key_proj."),
    (r"\.self\.pos_q_proj\.", ".self.pos_query_proj."),
    # The head of masked language models in Hugging Face's older classes.
    (r"^cls\.predictions\.transform\.", "lm_predictions.lm_head."),
    (r"^cls\.predictions\.(decoder\.)?bias$", "lm_predictions.lm_head.bias"),
    (r"^cls\.predictions\.decoder\.weight$", f"{WORDS}weight"),
)
"""Names of other writers (pattern, replacement), brought to ours one after the other."""


@dataclass(frozen=True)
class Source:
    """Where the weights of one model are, and what lies beside them."""

    name: str
    """As the user gave it."""
    files: tuple[Path, ...]
    """Files of tensors."""
    config: Mapping[str, Any] | None
    """What describes the architecture."""
    config_file: Path | None
    """Where that stands."""
    vocab_file: Path | None
    """The vocabulary that these weights were trained with."""
    checkpoint: Path | None = None
    """The checkpoint of ours that the files belong to."""


@dataclass(frozen=True)
class Stored:
    """A tensor that is in memory only while someone uses it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Gives it in fp32."""

    @classmethod
    def of(cls, weight: "Stored | Tensor") -> "Stored":
        """Return the same for a tensor that is in memory."""
        if isinstance(weight, Stored):
            return weight
        return cls(tuple(weight.shape), lambda: weight.detach().to("cpu", torch.float32))

    def plus(self, other: "Stored") -> "Stored":
        """Return the sum of two."""
        return Stored(self.shape, lambda: self.read() + other.read())


def find_source(place: Path, role: Role) -> Source:
    """Find a model's files.

    Args:
        place: a file of weights, a folder with one, a checkpoint of ours (or one model in it), the
            folder of several exports, or a hub name.
        role: which model of those that may lie together.

    Raises:
        FileNotFoundError: there is none, and what to give instead.
    """
    name = str(place)
    if not place.exists():
        if not HUB_NAME.fullmatch(name):
            raise FileNotFoundError(
                f"there is no {name}; --init_{role} must be a file or folder of weights, or the "
                "name of a model on the hub (owner/name)"
            )
        place = _download(name, role)
    if (place / role).is_dir():
        place = place / role
    checkpoint = place.parent
    if place.is_dir() and (checkpoint / "checkpoint.json").is_file():
        description = read_description(checkpoint)
        prefix = f"{place.name}/{WEIGHTS}-"
        files = tuple(checkpoint / n for n in description["files"] if n.startswith(prefix))
        config, file = description["models"][place.name], checkpoint / "checkpoint.json"
        return Source(name, files, config, file, checkpoint / "spm.model", checkpoint)
    files = (place,) if place.is_file() else _weight_files(place, role)
    folder = files[0].parent
    if files[0].name == "model.safetensors" and (folder / HEADS_FILE).is_file():
        files += (folder / HEADS_FILE,)
    # The public generators have their own; config.json beside them is the discriminator's.
    is_beside = ".generator." in files[0].name
    config_file = _first(folder, ("generator_config.json",) if is_beside else CONFIG_FILES)
    config = _read_config(config_file) if config_file else None
    if config is not None and "discriminator" in config:  # the original's, of both models
        config = config["generator" if role == "generator" else "discriminator"]
    return Source(name, files, config, config_file, _first(folder, VOCABULARY_FILES))


def read_weights(source: Source, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """Read all tensors of a source to the CPU, under the names that their writer gave them.

    Args:
        source: of `find_source`.
        shapes_only: give tensors without data, on the meta device, and read little.

    Raises:
        ValueError: a file is damaged, or holds more than tensors.
    """
    weights: dict[str, Tensor] = {}
    if source.checkpoint is not None and not shapes_only:
        files = read_description(source.checkpoint)["files"]
        mine = [str(file.relative_to(source.checkpoint)) for file in source.files]
        check_files(source.checkpoint, {name: files[name] for name in mine})
    for file in source.files:
        if file.suffix == ".safetensors":
            weights |= _read_safetensors(file, shapes_only)
        else:
            weights |= _read_pickle(file, shapes_only)
    return weights


def open_weights(source: Source) -> dict[str, Stored]:
    """Find all tensors of a source whose files are safetensors; each is read when it is used.

    Raises:
        ValueError: a file is damaged.
    """
    return {
        name: Stored(tuple(shape.shape), functools.partial(_read_tensor, file, name))
        for file in source.files
        for name, shape in _read_safetensors(file, shapes_only=True).items()
    }


def public_names(weights: Mapping[str, Tensor], *, role: Role, num_heads: int) -> dict[str, Tensor]:
    """Bring the layouts of other writers to the names of our parameters.

    Args:
        weights: of `read_weights`.
        role: which half to take, where the file holds a generator and a discriminator.
        num_heads: of the model; DeBERTa v1 stores queries, keys and values head by head.

    Raises:
        ValueError: two tensors that differ have the same meaning.
    """
    halves = {name.split(".")[0] for name in weights} & {"generator", "discriminator"}
    if len(halves) == 2:
        half = "generator." if role == "generator" else "discriminator."
        weights = {n.removeprefix(half): w for n, w in weights.items() if n.startswith(half)}
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        ours = functools.reduce(lambda n, rule: re.sub(*rule, n), RENAMES, name)
        if ours in renamed and not _is_same(renamed[ours], weight):
            raise ValueError(
                f"{name} has the meaning of {ours}, which is there too with other values; remove "
                "one of the two from the file"
            )
        renamed[ours] = weight
    return _split_in_proj(renamed, num_heads)


def sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return what the shapes say about the architecture, by the names of `DebertaConfig`."""
    found: dict[str, int] = {}
    for table, rows in ((WORDS, "vocab_size"), (POSITIONS, "max_position_embeddings")):
        for name in (f"{table}weight", f"{table}_weight"):
            if name in weights:
                found[rows], found["hidden_size"] = weights[name].shape
    layers = [re.match(r"deberta\.encoder\.layer\.(\d+)\.", name) for name in weights]
    found["num_hidden_layers"] = 1 + max((int(m[1]) for m in layers if m), default=-1)
    feed_forward = weights.get("deberta.encoder.layer.0.intermediate.dense.weight")
    if feed_forward is not None:
        found["intermediate_size"], found["hidden_size"] = feed_forward.shape
    return found


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{error} Or get it again.") from None


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _weight_files(folder: Path, role: Role) -> tuple[Path, ...]:
    patterns = (GENERATOR_FILE, *WEIGHT_FILES) if role == "generator" else WEIGHT_FILES
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return tuple(files[-1:] if pattern == WEIGHT_FILES[-1] else files)
    raise FileNotFoundError(
        f"{folder} must be a file of weights, or a folder with one of {', '.join(patterns)}, or "
        f"with a folder {role} that has one"
    )


@functools.cache
def _download(name: str, role: Role) -> Path:
    """Fetch a model from the hub, or find it in the cache, without what other roles need."""
    wanted = [GENERATOR_FILE] if role == "generator" else list(WEIGHT_FILES[:4])
    beside = ["config.json", "generator_config.json", *VOCABULARY_FILES]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted + beside))
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"there is no file or folder {name}, and the hub does not give a model of that name "
            f"({reason}). Without a network, get {' or '.join(wanted)} and config.json, spm.model "
            f"from https://huggingface.co/{name}/tree/main elsewhere, place them in one folder and "
            f"give --init_{role} THAT_FOLDER"
        ) from None
    if role == "generator" and not (folder / GENERATOR_FILE).is_file():
        raise FileNotFoundError(
            f"{name} has no {GENERATOR_FILE}: its generator was not published. Leave out "
            "--init_generator: then the generator starts from the discriminator"
        )
    return folder


def _read_tensor(file: Path, name: str) -> Tensor:
    # Mapped, not copied; each in a mapping of its own, which goes with the tensor.
    with safe_open(file, framework="pt") as tensors:  # pyright: ignore[reportPrivateImportUsage]
        return tensors.get_tensor(name).to(torch.float32)


def _read_safetensors(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:  # pyright: ignore[reportPrivateImportUsage]
            if not shapes_only:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            shapes = {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error}); get it again") from None
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _read_pickle(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    device = "meta" if shapes_only else "cpu"
    try:
        found = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: it holds more than tensors, and reading that could run code, or "
            f"it is no file of weights ({_reason(error)}). Get it again, or where you trust it "
            "save its tensors alone, as safetensors."
        ) from None
    except (RuntimeError, EOFError) as error:  # a zip that was cut short
        raise ValueError(f"{file} is damaged ({_reason(error)}); get it again") from None
    for wrapper in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file} must hold tensors by name; it holds a {type(found).__name__}")
    if strange := [str(name) for name, value in found.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{file} must hold tensors by name; {', '.join(strange[:4])} is none")
    return dict(found)


def _reason(error: Exception) -> str:
    """Return the part of torch's message that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0]


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    return torch.equal(one, other)


def _split_in_proj(weights: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Cut DeBERTa v1's in_proj in three, and give zeros for the biases that v1 does without."""
    split = dict(weights)
    for name in weights:
        if name.endswith(".self.in_proj.weight"):
            attention = name.removesuffix("in_proj.weight")
            # [3 * E, E], head by head the rows of query, key and value
            heads = split.pop(name).unflatten(0, (num_heads, 3, -1))  # [H, 3, D, E]
            for part, projection in enumerate(("query_proj", "key_proj", "value_proj")):
                split[f"{attention}{projection}.weight"] = heads[:, part].flatten(0, 1)
            zeros = heads.new_zeros(heads.shape[-1])
            split.setdefault(f"{attention}key_proj.bias", zeros)
            if f"{attention}pos_key_proj.weight" in split:
                split.setdefault(f"{attention}pos_key_proj.bias", zeros)
    return split
