"""Checkpoints: everything a training needs to go on as if it had never stopped.

    checkpoints/step_0000100/
        checkpoint.json            what it holds, and what it must be resumed with
        spm.model                  the vocabulary
        generator/ discriminator/  (or model/) weights, optimizer and schedule, by DeepSpeed
        random/rank_00000.pt       random states of each rank

A checkpoint is written aside and renamed when all of it is there, both models in one commit.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ds_deberta.distributed import barrier, is_main, logger, rank

FORMAT_VERSION = 1
_FOLDERS = f"step_{'[0-9]' * 7}"


@dataclass
class TrainState:
    """Where a training stands."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows read, over all ranks: the data's position."""
    evaluation_pending: bool = False
    """This step's evaluation was skipped, to stop in time."""


class Saveable(Protocol):
    """An engine, as far as a checkpoint needs it."""

    def save(self, folder: Path) -> None:
        """Write everything to a folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take everything from a folder."""
        ...


class Checkpointer:
    """Saves to and resumes from `output_dir`/checkpoints.

    Args:
        output_dir: the run's folder.
        keep: how many checkpoints to keep, newest first; 0 keeps all.
        identity: facts that a resumed run must share with the one that saved, name -> value.
        contents: facts to write down beside them (model configurations and the like).
        vocab_file: the sentencepiece model to copy into each checkpoint.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        keep: int,
        identity: Mapping[str, Any],
        contents: Mapping[str, Any],
        vocab_file: Path,
    ) -> None:
        self._folder = output_dir / "checkpoints"
        self._keep = keep
        # Through JSON and back: compared as it will be read.
        self._identity = json.loads(json.dumps(identity))
        self._contents = contents
        self._vocab_file = vocab_file

    def save(self, state: TrainState, engines: Mapping[str, Saveable]) -> Path:
        """Write a checkpoint of this step. Every rank must call it."""
        final = self._folder / f"step_{state.step:07d}"
        aside = final.with_suffix(".tmp")
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)  # left by a run that died while saving
            (aside / "random").mkdir(parents=True)
        barrier()
        for name, engine in engines.items():
            engine.save(aside / name)
        torch.save(_random_states(), aside / "random" / f"rank_{rank():05d}.pt")
        if is_main():
            shutil.copyfile(self._vocab_file, aside / "spm.model")
            description = {
                "format_version": FORMAT_VERSION,
                **asdict(state),
                "identity": self._identity,
                **self._contents,
            }
            (aside / "checkpoint.json").write_text(json.dumps(description, indent=2) + "\n")
        barrier()
        if is_main():
            shutil.rmtree(final, ignore_errors=True)  # the same step, saved before a resume
            os.rename(aside, final)
            self._rotate()
        barrier()
        logger.info("saved %s", final)
        return final

    def resume(self, engines: Mapping[str, Saveable]) -> TrainState:
        """Go on from the newest checkpoint, or from the start where there is none.

        Raises:
            ValueError: the checkpoint belongs to a training with other settings.
        """
        latest = self.check()
        if latest is None:
            return TrainState()
        description = read_description(latest)
        for name, engine in engines.items():
            engine.load(latest / name)
        _restore_random_states(torch.load(latest / "random" / f"rank_{rank():05d}.pt"))
        state = TrainState(
            description["step"],
            description["consumed_samples"],
            description.get("evaluation_pending", False),
        )
        logger.info("resumed from %s", latest)
        return state

    def check(self) -> Path | None:
        """The checkpoint that `resume` would go on from, if there is one.

        Raises:
            ValueError: it belongs to a training with other settings.
        """
        latest = self.latest()
        if latest is not None:
            self._check_identity(latest, read_description(latest)["identity"])
        return latest

    def latest(self) -> Path | None:
        """The newest checkpoint of this run, if there is one."""
        return max(self._folder.glob(_FOLDERS), default=None)

    def _check_identity(self, path: Path, saved: Mapping[str, Any]) -> None:
        different = [
            f"{name}: {saved.get(name)!r} then, {self._identity.get(name)!r} now"
            for name in sorted(saved.keys() | self._identity.keys())
            if saved.get(name) != self._identity.get(name)
        ]
        if different:
            raise ValueError(
                f"{path} was saved with other settings ({'; '.join(different)}). Resume with the "
                "same ones, or start a new run with another --output_dir."
            )

    def _rotate(self) -> None:
        if self._keep:
            for old in sorted(self._folder.glob(_FOLDERS))[: -self._keep]:
                shutil.rmtree(old)


def read_description(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's checkpoint.json says.

    Raises:
        ValueError: not a checkpoint, or one of another format version.
    """
    file = checkpoint / "checkpoint.json"
    if not file.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: it holds no checkpoint.json")
    description = json.loads(file.read_text())
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {description.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}"
        )
    return description


def _random_states() -> dict[str, torch.Tensor]:
    """Torch's generators: dropout's. Masks, order and samples need none, see data/loader.py."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
