"""README tells the truth about files, presets and commands."""

import re
import shlex
import subprocess
import sys

import pytest

from ds_deberta.config import parse
from ds_deberta.model import MODELS, load_model_config
from ds_deberta.recipes import RECIPES, backbone_parameters
from tests.launch import ROOT, clean_environment

README = (ROOT / "README.md").read_text()
CODE = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in CODE.splitlines() if line.split("#")[0].strip()]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_file_tree_names_every_module_and_nothing_else():
    tree = section("The files")
    named = set(re.findall(r"[\w/]+\.(?:py|sh)", tree))
    modules = {
        path.name
        for folder in ("ds_deberta", "data_tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    } | {"run_pretrain.py", "mlm.sh", "rtd.sh", "preset.sh", "plain.py"}
    assert named == modules


def test_the_preset_table_gives_the_sizes_that_are_built():
    rows = re.findall(
        r"^\| `([\w-]+)` \| (\w+) \| (\d+) x (\d+) \| (\d+) \| ([\d.]+) M \| ([\d.]+) M \|$",
        section("Presets"),
        re.MULTILINE,
    )
    table = {row[0]: row[1:] for row in rows}
    expected = {}
    for name, config in MODELS.items():
        objective = next(o for o, presets in RECIPES.items() if name in presets)
        expected[name] = (
            objective.upper(),
            str(config.num_hidden_layers),
            str(config.hidden_size),
            str(config.num_attention_heads),
            f"{backbone_parameters(config) / 1e6:.1f}",
            f"{128100 * config.hidden_size / 1e6:.1f}",
        )
    assert table == expected


def test_every_preset_has_an_architecture():
    assert all(load_model_config(name) for presets in RECIPES.values() for name in presets)


def test_every_config_in_the_zero_table_is_shipped():
    named = set(re.findall(r"`(zero\d_\w+)`", section("One GPU, many GPUs")))
    assert named
    assert named <= {path.stem for path in (ROOT / "ds_configs").glob("*.json")}


def test_every_promise_names_the_test_that_shows_it():
    rows = re.findall(r"^\| [A-Z].* \| (.*) \|$", section("Promises"), re.MULTILINE)
    named = [file for row in rows for file in re.findall(r"`(.*?)`", row)]
    assert all(re.fullmatch(r"(`tests/[\w/]+\.py`(, )?)+", row) for row in rows), rows
    assert [file for file in named if not (ROOT / file).is_file()] == []
    shown = {str(file.relative_to(ROOT)) for file in (ROOT / "tests/faults").glob("test_*.py")}
    assert shown <= set(named)
    assert named


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--objective" in c or ".sh " in c])
def test_training_commands_parse(command):
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if word.endswith((".py", ".sh"))) :]
    if words[0].endswith(".sh"):
        objective = words[0].removeprefix("./").removesuffix(".sh")
        words = ["", "--objective", objective, "--model", words[1], "--output_dir", "x", *words[2:]]
    parse([word for word in words[1:] if word != "..."])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "data_tools/" in c])
def test_data_commands_know_their_flags(command):
    words = shlex.split(command)
    shown = subprocess.run(
        [sys.executable, words[1], "--help"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(flag in shown for flag in words if flag.startswith("-"))
