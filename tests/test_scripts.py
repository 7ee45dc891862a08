"""rtd.sh and mlm.sh: which python they take, whose paths they mean, and that they build nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_deberta import recipes
from ds_deberta.config import parse
from tests.launch import ROOT, clean_environment

RECORDS = """#!/bin/sh
printf '%s ' "$0" "$@" >> "$RECORD"
echo >> "$RECORD"
"""


class Checkout:
    """The scripts in a folder, with stand-ins for programs that write down how they are called."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.elsewhere = folder / "elsewhere"
        self.record = folder / "record"
        for each in (self.home, self.elsewhere):
            each.mkdir()
        for name in ("rtd.sh", "mlm.sh", "preset.sh", "Makefile"):
            shutil.copy(ROOT / name, self.home / name)
        self.programs = folder / "bin"
        self.write(self.programs / "python", "#!/bin/sh\nexit 1\n")
        self.write(self.programs / "make", RECORDS)

    def write(self, file: Path, text: str = RECORDS) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    def start(
        self, *words: str, cwd: Path | None = None, status: int = 0, **variables: str
    ) -> list[str]:
        """Run a script in `cwd` (default: elsewhere); returns the calls, or the errors."""
        self.record.write_text("")
        environment = clean_environment() | {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "RECORD": str(self.record),
            "VIRTUAL_ENV": "",
            "CONDA_PREFIX": "",
            "PYTHONPATH": "",
        }
        done = subprocess.run(
            [str(self.home / words[0]), *words[1:]],
            cwd=cwd or self.elsewhere,
            env=environment | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        return (done.stderr if status else self.record.read_text()).splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_without_the_packages_one_line_says_what_to_do(checkout):
    (error,) = checkout.start("rtd.sh", "deberta-v3-nano", status=2)
    assert f"run `make setup` in {checkout.home}" in error
    assert not checkout.record.read_text()


def test_an_active_environment_comes_first_and_then_a_complete_one(checkout, tmp_path):
    def taken(**variables: str) -> str:
        calls = checkout.start("mlm.sh", "bert-base", "--data_dir", "x", **variables)
        return calls[-1].split()[0]

    own = checkout.write(checkout.home / ".venv/bin/python")
    venv = checkout.write(tmp_path / "venv/bin/python")
    conda = checkout.write(tmp_path / "conda/bin/python")
    checkout.start("mlm.sh", "bert-base", "--data_dir", "x", status=2)  # .venv is not complete
    (checkout.home / ".venv/.complete").touch()
    assert taken() == str(own)
    assert taken(CONDA_PREFIX=str(tmp_path / "conda")) == str(conda)
    assert taken(VIRTUAL_ENV=str(tmp_path / "venv"), CONDA_PREFIX=str(conda)) == str(venv)
    venv.write_text("#!/bin/sh\nexit 1\n")  # lacks the packages
    assert taken(VIRTUAL_ENV=str(tmp_path / "venv")) == str(own)


def test_paths_on_the_command_line_are_the_callers(checkout):
    checkout.write(checkout.programs / "python")
    words = ("mlm.sh", "bert-base", "--data_dir", "data/mine")
    call = checkout.start(*words)[-1]
    assert f" {checkout.home}/run_pretrain.py --objective mlm --model bert-base " in call
    assert " --output_dir runs/bert-base --data_dir data/mine " in call
    assert " run_pretrain.py --objective" in checkout.start(*words, cwd=checkout.home)[-1]


@pytest.mark.parametrize("script", ["rtd.sh", "mlm.sh"])
def test_missing_data_are_prepared_beside_the_scripts(checkout, script):
    python = checkout.write(checkout.programs / "python")
    *_, make, train = checkout.start(script, "deberta-v3-nano")
    asked = f"--directory {checkout.home} DATA_PYTHON={python} data/demo/manifest.json"
    assert asked in make
    assert f" --data_dir {checkout.home}/data/demo " in train
    for words in (["--config", "x/config.json"], ["--output_dir", "x", "--plan"]):
        calls = checkout.start(script, "deberta-v3-nano", *words)
        assert not [call for call in calls if "/bin/make " in call]
    assert "--data_dir" not in checkout.start(script, "bert-base", "--config=x")[-1]


def test_preparing_data_builds_no_environment(checkout):
    for data in ("demo", "wikitext-103"):
        words = ["/usr/bin/make", "--dry-run", f"data/{data}/manifest.json", "PYTHON=mine"]
        done = subprocess.run(words, cwd=checkout.home, capture_output=True, text=True, check=True)
        assert "venv" not in done.stdout
        assert "mine data_tools/prepare_data.py" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["deberta-v3-nano", "--help"]])
def test_help_lists_presets_and_flags(checkout, words):
    checkout.write(checkout.programs / "python")
    presets, flags = checkout.start("rtd.sh", *words)[-2:]
    assert presets.endswith("-m ds_deberta.recipes rtd --help ")
    assert flags.endswith("run_pretrain.py --help ")


def test_the_presets_of_an_objective_are_help(monkeypatch, capsys):
    monkeypatch.setattr(recipes, "backbone_parameters", lambda _: 1e6)
    monkeypatch.setattr(sys, "argv", ["recipes", "rtd", "--help"])
    recipes.main()
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in recipes.RECIPES["rtd"])


def test_shipped_configurations_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--objective", "rtd", "--model", "deberta-v3-nano", "--output_dir", "x"]
    for more in ([], ["--deepspeed_config", "ds_configs/zero2_fp32.json"]):
        assert parse([*flags, *more]).deepspeed_config.is_file()
    own = Path("ds_configs/zero2_fp32.json")
    own.parent.mkdir()
    own.touch()
    assert parse([*flags, "--deepspeed_config", str(own)]).deepspeed_config == own
    missing = ["--deepspeed_config", "ds_configs/none.json"]
    assert parse([*flags, *missing]).deepspeed_config == Path("ds_configs/none.json")
    assert os.listdir() == ["ds_configs"]
