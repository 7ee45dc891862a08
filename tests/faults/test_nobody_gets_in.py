"""Reading a file runs no code, names reach no shell, and only this machine is listened to."""

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_deberta.distributed import find_place
from ds_deberta.hf import export_checkpoint
from ds_deberta.launch import check_options
from ds_deberta.weights import WEIGHT_FILES, find_source, read_weights
from tests.launch import ROOT, clean_environment, run_ranks

SOURCES = [*(ROOT / "ds_deberta").rglob("*.py"), *(ROOT / "data_tools").glob("*.py")]
SOURCES += [ROOT / "run_pretrain.py", *(ROOT / "benchmarks").glob("*.py")]
NASTY = "a b'c\"$(touch pwned);`touch pwned`&|*"


class Intruder:
    """Runs code when it is unpickled: makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def malicious(trace: Path, kind: str) -> bytes:
    """What torch.save, or an older pickle, writes."""
    if kind == "pickle":
        return pickle.dumps({"module": Intruder(trace)})
    content = io.BytesIO()
    torch.save({"module": Intruder(trace), "weight": torch.ones(2)}, content)
    return content.getvalue()


def test_the_intruder_would_get_in(tmp_path):
    """Else the tests below prove nothing."""
    for kind in ("zip", "pickle"):
        (tmp_path / kind).write_bytes(malicious(tmp_path / f"trace_{kind}", kind))
    torch.load(tmp_path / "zip", weights_only=False)
    pickle.loads((tmp_path / "pickle").read_bytes())
    assert (tmp_path / "trace_zip").is_dir()
    assert (tmp_path / "trace_pickle").is_dir()


@pytest.mark.parametrize("kind", ["zip", "pickle"])
@pytest.mark.parametrize("shapes_only", [False, True])
@pytest.mark.parametrize("name", ["other.bin", *(x.replace("*", "1") for x in WEIGHT_FILES)])
def test_initial_weights_are_read_without_running_code(tmp_path, name, kind, shapes_only):
    """--init_model, --init_generator and --init_discriminator: a file or its folder."""
    file = tmp_path / "weights" / name
    file.parent.mkdir()
    file.write_bytes(malicious(tmp_path / "trace", kind))
    for place in (file, file.parent) if name != "other.bin" else (file,):
        source = find_source(place, "discriminator")
        with pytest.raises(ValueError, match=r"is refused|is no safetensors file|is damaged"):
            read_weights(source, shapes_only=shapes_only)
    assert not (tmp_path / "trace").exists()


@pytest.fixture(scope="module")
def trained(data_dir, tiny_model_file, tmp_path_factory) -> tuple[list[str], Path]:
    """The flags and the folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = [
        *("--objective", "mlm", "--model", str(tiny_model_file), "--data_dir", str(data_dir)),
        *("--deepspeed_config", str(ROOT / "ds_configs/zero1_fp32.json"), "--num_workers", "0"),
        *("--max_seq_length", "32", "--train_batch_size", "4", "--log_interval", "1"),
        *("--warmup", "1"),
    ]
    more = ("--output_dir", str(folder), "--num_training_steps", "2")
    run_ranks(ROOT / "run_pretrain.py", *flags, *more)
    return flags, folder


@pytest.mark.slow
@pytest.mark.distributed
def test_no_file_of_a_checkpoint_can_run_code(trained, tmp_path):
    """Each in turn, for the export and for a resumed training."""
    flags, folder = trained
    (checkpoint,) = folder.glob("checkpoints/step_*")
    names = [str(x.relative_to(checkpoint)) for x in checkpoint.rglob("*") if x.is_file()]
    assert len(names) > 3
    for number, name in enumerate(names):
        for kind in ("zip", "pickle"):
            trace, copy = tmp_path / f"trace{number}{kind}", tmp_path / f"run{number}{kind}"
            shutil.copytree(folder, copy)
            file = copy / "checkpoints" / checkpoint.name / name
            file.write_bytes(malicious(trace, kind))
            try:
                export_checkpoint(file.parents[name.count("/")], tmp_path / f"out{number}{kind}")
            except Exception as error:  # that nothing ran is what counts here
                print(f"export, {name} ({kind}): {type(error).__name__}")
            assert not trace.exists(), f"export ran {name}"
        words = [*flags, "--output_dir", str(copy), "--num_training_steps", "3"]
        subprocess.run(
            [sys.executable, str(ROOT / "run_pretrain.py"), *words],
            env=clean_environment(),
            cwd=ROOT,
            capture_output=True,
            timeout=120,
        )
        assert not trace.exists(), f"resume ran {name}"


def calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]


def test_no_line_of_code_could_run_a_file_or_a_users_string():
    """By reading all of it: no pickles, no `eval`, no shell; torch.load takes tensors alone."""
    forbidden = {
        *("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "np.load"),
        *("numpy.load", "yaml.load", "yaml.unsafe_load", "joblib.load", "subprocess.getoutput"),
        *("torch.hub.load", "__import__", "marshal.loads", "shelve.open", "dill.load"),
    }
    found = []
    for file in SOURCES:
        for call in calls(file):
            name = ast.unparse(call.func)
            options = {k.arg: ast.unparse(k.value) for k in call.keywords}
            is_bad = name in forbidden or options.get("shell", "False") != "False"
            is_bad |= options.get("trust_remote_code", "False") != "False"
            is_bad |= options.get("allow_pickle", "False") != "False"
            is_bad |= name == "torch.load" and options.get("weights_only", "True") != "True"
            if is_bad:
                found.append(f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert found == []
    assert len(SOURCES) > 40


FAKE_PYTHON = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$RECORD"
echo --- >> "$RECORD"
"""


@pytest.mark.parametrize("script", ["rtd.sh", "mlm.sh"])
def test_scripts_pass_names_on_as_they_are(tmp_path, script):
    """With a stand-in for python that writes down its words."""
    for name in (script, "preset.sh"):
        shutil.copy(ROOT / name, tmp_path / name)  # no .venv beside it
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(FAKE_PYTHON)
    (tmp_path / "bin/python").chmod(0o755)
    environment = clean_environment() | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "VIRTUAL_ENV": "",
        "CONDA_PREFIX": "",
    }
    for preset in ("bert-base", NASTY):
        words = [f"./{script}", preset, "--data_dir", NASTY, "--output_dir", NASTY]
        subprocess.run(words, cwd=tmp_path, env=environment, check=True)
        calls = (tmp_path / "record").read_text().split("---\n")
        assert calls[-2].splitlines()[-2:] == ["--output_dir", NASTY]
        assert preset in calls[-2].splitlines()
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_whole_run_in_folders_of_nasty_names(data_dir, tiny_model_file, tmp_path):
    data = shutil.copytree(data_dir, tmp_path / NASTY / "data")
    model = shutil.copy(tiny_model_file, tmp_path / NASTY / "config.json")
    output = tmp_path / NASTY / "run"
    words = [sys.executable, "-m", "ds_deberta.launch", "--num_accelerators", "2", str(ROOT)]
    words[-1:] = ["run_pretrain.py", "--objective", "mlm", "--model", str(model)]
    words += ["--data_dir", str(data), "--output_dir", str(output), "--max_seq_length", "32"]
    words += ["--train_batch_size", "4", "--num_training_steps", "2", "--num_workers", "1"]
    words += ["--warmup", "1"]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=clean_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "export/model/model.safetensors").is_file()
    assert not [*tmp_path.rglob("pwned"), *ROOT.glob("pwned")]


@pytest.mark.parametrize(
    "word", ["it's", "$(ls)", "a;ls", "c2p|p2c", "a b $(ls)", "a b `ls`", "a b\\", "%h", "", "*"]
)
def test_words_that_a_remote_shell_would_change_are_refused(tmp_path, word):
    """deepspeed quotes words with a space alone, and these with double quotes."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node0 slots=1\n")
    one = find_place({})
    options = ["--hostfile", str(hostfile)]
    fine = ["--output_dir", "a b;'c", "--x=a/b-c", "1e-4", "@x:y,z", "microsoft/deberta-v3-base"]
    check_options(options, one, None, ["run_pretrain.py", *fine])
    with pytest.raises(ValueError, match="a shell of the other nodes would change"):
        check_options(options, one, None, ["run_pretrain.py", word])
    check_options([], one, None, ["run_pretrain.py", word])


@pytest.mark.distributed
def test_ranks_of_one_machine_listen_to_it_alone():
    run_ranks(ROOT / "tests/workers/listening.py", world_size=2)


def test_one_machine_is_the_default_and_tensorboard_stays_on_it():
    assert find_place({}).master_addr == "127.0.0.1"
    readme = (ROOT / "README.md").read_text()
    assert "tensorboard --logdir" in readme
    assert "--bind_all" not in readme
    assert "--host" not in "".join(x for x in readme.splitlines() if "tensorboard --logdir" in x)


@pytest.mark.slow
@pytest.mark.distributed
def test_files_of_a_run_have_the_users_umask(trained, tmp_path):
    flags, _ = trained
    folder = tmp_path / "run"
    words = [*flags, "--output_dir", str(folder), "--num_training_steps", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_pretrain.py"), *words],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.umask(0o027),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777)
        for path in folder.rglob("*")
        if path.stat().st_mode & 0o777 != (0o750 if path.is_dir() else 0o640)
    }
    assert wrong == {}


def test_a_safetensors_file_of_lies_is_an_error(tmp_path):
    """Offsets beyond the file, or overlapping."""
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(4)}, file)
    for offsets in ([0, 10**9], [8, 4], [-1, 3]):
        header = {"x": {"dtype": "F32", "shape": [4], "data_offsets": offsets}}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        with pytest.raises(ValueError, match="no safetensors file"):
            read_weights(find_source(file, "model"))
