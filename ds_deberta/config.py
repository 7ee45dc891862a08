"""The configuration of a run: composed of the parts' dataclasses, parsed from the command line.

Every field is a flag of the same name; the text under a field is its help. Later wins: defaults,
the preset's recipe, a `--config` file, the command line.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ds_deberta.data.sampler import SkippedSamples
from ds_deberta.health import HealthConfig
from ds_deberta.json_file import read_object
from ds_deberta.optim import OptimConfig
from ds_deberta.recipes import RECIPES, recipe
from ds_deberta.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is masked."""

    data_dir: Path = Path("data/demo")
    """Folder that data_tools/prepare_data.py wrote; it carries its vocabulary."""
    max_seq_length: int | None = None
    """Tokens per row, [CLS] and [SEP] included; shorter rows are padded. Default: the length that
    the data were prepared with."""
    mask_prob: float = 0.15
    """Share of the tokens that are predicted."""
    max_ngram: int = 1
    """Longest run of whole words masked together (1: single tokens; always 1 for RTD). A word has
    8 tokens at most; in scripts without spaces each piece is one."""
    num_workers: int = 2
    """Processes that mask ahead, per rank; 0: in the training process."""
    skip_samples: str = ""
    """Numbers of samples to pass over, A-B[,C-D...], both ends included, as in what is written of
    skipped updates. Which rows the others are, and their order, does not change."""

    def __post_init__(self) -> None:
        if self.max_seq_length is not None and self.max_seq_length < 3:
            raise ValueError(f"max_seq_length must be at least 3, got {self.max_seq_length}")
        SkippedSamples(self.skip_samples)

    @property
    def row_length(self) -> int:
        """`max_seq_length` of a run that `resolve` has filled in."""
        assert self.max_seq_length is not None
        return self.max_seq_length


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    model: str
    """Preset (see README), or path of a config.json."""
    embedding_sharing: Literal["gdes", "es", "nes"] = "gdes"
    """RTD: gradient-disentangled, full or no sharing of token embeddings."""
    relative_attention: bool | None = None
    """Relative positions in attention; default: the model's."""
    pos_att_type: str | None = None
    """Position terms, "c2p|p2c", "c2p", "p2c" or "none"; default: the model's."""
    dropout: float | None = None
    """Dropout of hidden states and attention; default: the model's."""
    attention: Literal["auto", "cpu", "reference", "triton"] = "auto"
    """Attention: triton (fused, CUDA), cpu, reference (plain torch), or what suits the device."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and make the rest again backwards: less memory, slower."""
    compile: bool = False
    """Compile the layers with torch.compile at the first step; not with ZeRO 3."""
    init_model: Path | None = None
    """MLM: start from these weights (a folder or file, see README)."""
    init_generator: Path | None = None
    """RTD: start the generator from these weights."""
    init_discriminator: Path | None = None
    """RTD: start the discriminator from these weights."""


@dataclass(frozen=True, kw_only=True)
class RTDConfig:
    """Replaced token detection."""

    rtd_lambda: float = 10.0
    """Weight of the discriminator's loss."""
    temperature: float = 1.0
    """Temperature of the generator's samples."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything about a run."""

    objective: Literal["rtd", "mlm"]
    """rtd: replaced token detection; mlm: masked language modeling."""
    output_dir: Path
    """Folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, export/."""
    deepspeed_config: Path = Path("ds_configs/zero1_auto.json")
    """DeepSpeed JSON: ZeRO stage, precision, clipping, communication, offload. Those of ds_configs/
    are found from any folder."""
    seed: int = 1234
    """Of weights, order, masks, samples and dropout."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in --output_dir, if any; never: refuse if any."""
    accept_changes: tuple[str, ...] = ()
    """Settings that may be others than in the checkpoint (its error names them): data,
    train_batch_size, ...; other data are read from their first row on."""
    expect_world_size: int | None = None
    """Refuse to start with another number of processes."""
    push_to_hub: str | None = None
    """Upload the models at the end to the Hugging Face hub, as NAME or OWNER/NAME (the generator as
    NAME-generator); new repositories are private. Needs a network and a token."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig
    rtd: RTDConfig = field(default_factory=RTDConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "deepspeed_config", _or_shipped(self.deepspeed_config))
        if self.objective == "rtd" and self.data.max_ngram != 1:
            raise ValueError(
                f"max_ngram must be 1 for RTD, which masks single tokens; got {self.data.max_ngram}"
            )
        wrong = {
            "rtd": {"init_model": self.model.init_model},
            "mlm": {
                "init_generator": self.model.init_generator,
                "init_discriminator": self.model.init_discriminator,
            },
        }[self.objective]
        for name, value in wrong.items():
            if value is not None:
                raise ValueError(f"--{name} does not go with --objective {self.objective}")
        if self.rtd.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.rtd.temperature}")
        if self.rtd.rtd_lambda <= 0:
            raise ValueError(f"rtd_lambda must be positive, got {self.rtd.rtd_lambda}")
        if self.model.dropout is not None and not 0 <= self.model.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.model.dropout}")

    def to_json(self) -> str:
        """All fields by their flags' names; `--config` reads it back."""
        return json.dumps(self.values(), indent=2)

    def values(self) -> dict[str, Any]:
        """All fields by their flags' names, as plain values."""
        values = {name: getattr(part, name) for part, name in _leaves(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


_LENGTHS = ("epochs", "num_training_steps")
# Checked on the command line alone: a saved configuration holds every field.
_RTD_ONLY = {"embedding_sharing", "rtd_lambda", "temperature", "discriminator_learning_rate"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A run, and what to do in place of it."""

    run: PretrainConfig
    validate: bool
    plan: Literal["cpu", "gpu"] | None
    tokens_per_second: float | None


def parse(argv: Sequence[str] | None = None) -> PretrainConfig:
    """Read the run from the command line; see `parse_command`."""
    return parse_command(argv).run


def parse_command(argv: Sequence[str] | None = None) -> Command:
    """Read the command line.

    Errors in it end the program with status 2, after a line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="run_pretrain.py",
        description="Pre-train DeBERTa by masked language modeling (mlm) or replaced token "
        "detection (rtd). --model PRESET fills in a recipe; flags win over it.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="config.json of a run, to start from")
    # The launchers add one or the other; the LOCAL_RANK variable is what counts.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    instead = parser.add_argument_group("Instead of training")
    instead.add_argument(
        "--validate",
        action="store_true",
        help="check settings, data and this machine; status 2 if something is wrong",
    )
    instead.add_argument(
        "--plan",
        nargs="?",
        const="gpu",
        choices=("cpu", "gpu"),
        help="print the memory, disk and time that the run will need, on GPUs or CPUs "
        "(default: gpu), for --expect_world_size processes; needs no GPU and no data",
    )
    instead.add_argument(
        "--tokens_per_second",
        type=float,
        help="speed to plan with, of all processes together; default: the last one measured in "
        "--output_dir",
    )
    _add_flags(parser, PretrainConfig)
    args = vars(parser.parse_args(argv))
    args.pop("local_rank", None)
    config_file = args.pop("config")
    instead_of_run = {name: args.pop(name) for name in ("validate", "plan", "tokens_per_second")}
    try:
        saved = _read_config(config_file) if config_file else {}
        given = _with_one_length(saved, args) | args
        for name in ("objective", "model", "output_dir"):
            if name not in given:
                raise ValueError(f"--{name} must be given (presets: {preset_names()})")
        if (speed := instead_of_run["tokens_per_second"]) is not None:
            if not instead_of_run["plan"]:
                raise ValueError("--tokens_per_second goes with --plan; add that, or leave it out")
            if not 0 < speed < math.inf:
                raise ValueError(f"tokens_per_second must be positive, got {speed}")
        if given["objective"] == "mlm" and (lost := sorted(args.keys() & _RTD_ONLY)):
            raise ValueError(f"--{lost[0]} does not go with --objective mlm")
        filled = _with_one_length(recipe(given["objective"], given["model"]), given) | given
        return Command(run=_build(PretrainConfig, filled), **instead_of_run)
    except ValueError as error:
        parser.exit(2, f"run_pretrain.py: {error}\n")


def _or_shipped(path: Path) -> Path:
    """A file of ds_configs/ beside the package, if the current folder has no such file."""
    shipped = Path(__file__).parent.parent / path
    is_shipped = path.parts[:1] == ("ds_configs",) and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


def _with_one_length(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """Settings that lose to others, without the length of the training if those give one.

    Raises:
        ValueError: those give two.
    """
    given = [name for name in _LENGTHS if higher.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} does not go with --{given[1]}; give one of them")
    return {k: v for k, v in lower.items() if not given or k not in _LENGTHS}


def preset_names() -> str:
    """All presets, by objective."""
    return "; ".join(f"{name}: {', '.join(presets)}" for name, presets in RECIPES.items())


def _fields(config_type: type) -> Iterator[tuple[str, Any, Any]]:
    """(name, type, default) of every field; nested dataclasses as a field of their type."""
    hints = typing.get_type_hints(config_type)
    for each in dataclasses.fields(config_type):
        yield each.name, hints[each.name], each.default


def _leaves(config: Any) -> Iterator[tuple[Any, str]]:
    for name, kind, _ in _fields(type(config)):
        if dataclasses.is_dataclass(kind):
            yield from _leaves(getattr(config, name))
        else:
            yield config, name


def _build(config_type: Any, values: dict[str, Any]) -> Any:
    """Fill a dataclass and those nested in it from flat values."""
    arguments = {}
    for name, kind, _ in _fields(config_type):
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, values)
        elif name in values:
            arguments[name] = _convert(name, kind, values[name])
    return config_type(**arguments)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """A value from the command line, a recipe or a JSON file as the field's own type."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list of names; got {value!r}")
        return tuple(_convert(name, options[0], each) for each in value)
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _convert(name, options[0], value)
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")
        return value
    try:
        if kind is bool:
            return (
                value if isinstance(value, bool) else {"true": True, "false": False}[value.lower()]
            )
        if isinstance(value, bool):
            raise TypeError
        if kind is int:
            number = int(value) if re.fullmatch(r"-?\d+", str(value)) else float(value)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            if not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        if not isinstance(value, str | Path):
            raise TypeError
        return kind(value)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise ValueError(
            f"{name} must be {names.get(kind, kind.__name__)}; got {value!r}"
        ) from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = read_object(path)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from None
    known = set(_flag_names(PretrainConfig))
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"--config {path} holds unknown settings: {', '.join(unknown)}")
    return values


def _flag_names(config_type: type) -> Iterator[str]:
    for name, kind, _ in _fields(config_type):
        if dataclasses.is_dataclass(kind):
            yield from _flag_names(typing.cast(type, kind))
        else:
            yield name


def _add_flags(parser: argparse.ArgumentParser, config_type: Any) -> None:
    texts = _field_docs(config_type)
    group = parser.add_argument_group(config_type.__doc__.splitlines()[0].rstrip("."))
    nested = []
    for name, kind, default in _fields(config_type):
        if dataclasses.is_dataclass(kind):
            nested.append(kind)
            continue
        text = texts[name].replace("%", "%%")
        if default not in (dataclasses.MISSING, None, ()):
            text += f" (default: {default})"
        choices = ", ".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else None
        metavar = f"{{{choices}}}" if choices else getattr(kind, "__name__", "VALUE").upper()
        is_list = typing.get_origin(kind) is tuple
        more: dict[str, Any] = (
            {"nargs": "+", "metavar": "NAME"} if is_list else {"metavar": metavar}
        )
        # Values stay strings here: the recipe's and the file's go through the same conversion.
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **more)
    for kind in nested:
        _add_flags(parser, kind)


def _field_docs(config_type: type) -> dict[str, str]:
    """The string that stands under each field."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_type)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    return {
        before.target.id: str(after.value.value)
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
