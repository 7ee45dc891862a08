"""Checkpoints: everything a training needs to go on as if it had never stopped.

    checkpoints/step_0000100/
        checkpoint.json            what it holds: settings, counters, every file's size and sha256
        spm.model                  the vocabulary
        generator/ discriminator/  (or model/) weights and optimizer state, see model_state.py

It fits any number of processes, ZeRO stage and precision. It is written aside, brought to the disk
and renamed when all of it is there; all ranks do that together, or none. Writing needs only this
rank's copy of its share, so training may go on meanwhile; all that ranks do together is done by the
training's own thread. Nothing random is in it: order, masks and samples are functions of the seed
and a sample's number, dropout of seed and step.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from ds_deberta.data import DebertaTokenizer
from ds_deberta.data.tokenizer import first_difference
from ds_deberta.distributed import gather_objects, is_main, logger, rank, world_size
from ds_deberta.model_state import (
    WEIGHTS,
    ModelState,
    Share,
    copy_shares,
    gather_shares,
    read_shards,
    sha256,
    sync_folder,
    write_shares,
)

FORMAT_VERSION = 2
FIXED = ("objective", "models", "embedding_sharing")
"""Settings of a run that can not change on the way."""
_NAME = re.compile(r"step_\d{7,}")
_ASIDE = re.compile(r"step_\d{7,}(\.old)?\.tmp")
_T = TypeVar("_T")
_STATES_OF_ADAM = 3  # the weights and two moments


@dataclass
class TrainState:
    """Where a training stands."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """The data's position: the next sample's number. What is before was read, or passed over."""
    evaluation_pending: bool = False
    """This step's evaluation was skipped, to stop in time."""
    seconds: float = 0.0
    """What the steps have taken, over all starts, evaluations and checkpoints included."""


class Saveable(Protocol):
    """An engine, as far as a checkpoint needs it."""

    def state(self) -> ModelState:
        """Describe what has been trained."""
        ...

    def restore(self, state: ModelState) -> None:
        """Go on from such a state."""
        ...


class SaveError(Exception):
    """A checkpoint could not be written, on all ranks; the older ones are as they were."""


class DamageError(ValueError):
    """A checkpoint is not as it was written."""


class Checkpointer:
    """Saves to and resumes from `output_dir`/checkpoints.

    Args:
        output_dir: the run's folder.
        keep: how many checkpoints to keep, newest first; 0 keeps all.
        identity: facts that a resumed run must share with the one that saved, name -> value.
        placement: facts that may be others, and are only told: ranks, stage, precision.
        settings: all that may change without a flag, by kind, name -> value; changes are listed.
        contents: facts to write down beside them (model configurations and the like).
        vocab_file: the sentencepiece model to copy into each checkpoint.
        accept_changes: names of the identity that may have changed all the same.

    Raises:
        ValueError: `accept_changes` names what can not change.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        keep: int,
        identity: Mapping[str, Any],
        placement: Mapping[str, Any],
        contents: Mapping[str, Any],
        vocab_file: Path,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        accept_changes: Collection[str] = (),
    ) -> None:
        self._folder = output_dir / "checkpoints"
        self._keep = keep
        # Through JSON and back: compared as it will be read.
        self._identity = json.loads(json.dumps(identity))
        self._placement = json.loads(json.dumps(placement))
        self._settings = json.loads(json.dumps(settings or {}))
        self._contents = contents
        self._vocab_file = vocab_file
        self._accepted = accept_changes
        self._unfinished: _Unfinished | None = None
        self._damaged: set[Path] = set()  # found so at the resume
        self.current: Path | None = None
        """The checkpoint that was written, or resumed from, last."""
        changeable = sorted(self._identity.keys() - set(FIXED))
        if wrong := sorted(set(accept_changes) - set(changeable)):
            raise ValueError(
                f"accept_changes can be any of {', '.join(changeable)}; got {', '.join(wrong)}"
            )

    def save(
        self, state: TrainState, engines: Mapping[str, Saveable], *, in_background: bool = False
    ) -> None:
        """Write a checkpoint of this step. Every rank must call it, after `finish`.

        Args:
            state: where the training stands.
            engines: what it trains.
            in_background: only copy each rank's share to CPU memory and begin to write it;
                `finish` makes it a checkpoint.

        Raises:
            SaveError: on every rank, if one could not write.
        """
        assert self._unfinished is None
        final = self._folder / f"step_{state.step:07d}"
        aside = final.with_suffix(".tmp")
        states = {name: engine.state() for name, engine in engines.items()}
        with _all_or_nothing(final, aside):
            _together(lambda: self._begin(aside, states) if is_main() else None)
        shares = _gather_shares(states, copies=in_background)
        if in_background:
            shares = copy_shares(shares)
        self._unfinished = _Unfinished(
            final,
            aside,
            asdict(state),
            {name: model.numbers for name, model in states.items()},
            _start(partial(write_shares, shares, aside), in_background=in_background),
        )
        if not in_background:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """True as long as `finish` would have to wait for this rank."""
        return self._unfinished is not None and not self._unfinished.files.done()

    def finish(self) -> None:
        """Wait until all ranks have written what they began to, and make it a checkpoint.

        Every rank must call it. Where nothing was begun there is nothing to do.

        Raises:
            SaveError: on every rank, if one could not write.
        """
        if (save := self._unfinished) is None:
            return
        self._unfinished = None
        with _all_or_nothing(save.final, save.aside):
            files = {k: v for part in _together(save.files.result) for k, v in part.items()}
            _together(lambda: self._commit(save, files) if is_main() else None)
        self.current = save.final
        logger.info("saved %s", save.final)

    def resume(self, engines: Mapping[str, Saveable]) -> TrainState:
        """Go on from the newest checkpoint that is whole, or from the start where there is none.

        Every rank must call it.

        Raises:
            ValueError: the checkpoint belongs to a training with other settings or another
                vocabulary; or there are checkpoints, but none is whole.
        """
        if is_main():
            self._sweep()
        chosen = self._choose()
        if chosen is None:
            self._warn_of_little_space(engines)
            return TrainState()
        path, description = chosen
        self._check_vocabulary(path)
        changed = self._check_identity(path, description["identity"])
        for name, engine in engines.items():
            engine.restore(read_shards(path / name, description["numbers"][name]))
        state = TrainState(**description["state"])
        was, now = description["placement"], self._placement
        differing = [name for name in now if was.get(name) != now[name]]
        moved = (
            f", saved with {_listed(was, differing)}; now with {_listed(now, differing)}"
            if differing
            else ""
        )
        logger.info("resumed from %s%s", path, moved)
        for change in changed.values():
            logger.info("accepted: %s", change)
        if listed := _changes(description.get("settings", {}), self._settings):
            logger.info("changed since the checkpoint: %s", ", ".join(listed))
        if "data" in changed:
            logger.info("other data: they are read from their first row on")
            state.consumed_samples = 0
        self.current = path
        self._warn_of_little_space(engines)
        return state

    def check(self) -> Path | None:
        """The checkpoint that `resume` would go on from, if there is one.

        Raises:
            ValueError: as `resume`.
        """
        chosen = self._choose()
        if chosen is None:
            return None
        path, description = chosen
        self._check_vocabulary(path)
        self._check_identity(path, description["identity"])
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint of this run, whole or not, if there is one."""
        return next(iter(self._saved()), None)

    def _saved(self) -> list[Path]:
        """All checkpoints, newest first."""
        names = os.listdir(self._folder) if self._folder.is_dir() else []
        found = [self._folder / name for name in names if _NAME.fullmatch(name)]
        return sorted(found, key=_step, reverse=True)

    def _begin(self, aside: Path, states: Mapping[str, ModelState]) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        for name in states:
            (aside / name).mkdir(parents=True)
        needed = sum(state.num_bytes() for state in states.values())
        free = shutil.disk_usage(aside).free
        if free < needed:
            raise OSError(
                f"it takes {_gib(needed)}, and {_gib(free)} are free in {self._folder}; make room, "
                "or keep fewer (--keep_checkpoints)"
            )

    def _commit(self, save: "_Unfinished", files: Mapping[str, Any]) -> None:
        """Describe what is there, and make it the checkpoint of its step in one rename."""
        aside, final = save.aside, save.final
        content = self._vocab_file.read_bytes()
        _write(aside / "spm.model", content)
        vocabulary = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        description = {
            "format_version": FORMAT_VERSION,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": save.state,
            "identity": self._identity,
            "placement": self._placement,
            "settings": self._settings,
            **self._contents,
            "numbers": save.numbers,
            "files": {**files, "spm.model": vocabulary},
        }
        description = json.loads(json.dumps(description))  # hashed as it will be read
        description["sha256"] = _digest(description)
        _write(aside / "checkpoint.json", (json.dumps(description, indent=1) + "\n").encode())
        for folder in (*(aside / name for name in save.numbers), aside):
            sync_folder(folder)
        old = final.with_suffix(".old.tmp")
        if final.exists():  # passed over at a resume, as damaged
            os.rename(final, old)
        os.rename(aside, final)
        sync_folder(self._folder)
        self._damaged.discard(final)
        shutil.rmtree(old, ignore_errors=True)
        for path in self._superfluous(_step(final)):
            _remove(path)

    def _superfluous(self, step: int) -> list[Path]:
        """Return the checkpoints that `keep` whole ones up to this step are newer than.

        Those of later steps were passed over at a resume: they do not count, nor do damaged ones.
        Here these are told by what a look at their sizes shows: hashing takes too long.
        """
        count, old = 0, []
        for path in self._saved() if self._keep else []:
            if _step(path) <= step and count >= self._keep:
                old.append(path)
            elif _step(path) <= step and path not in self._damaged and _looks_whole(path):
                count += 1
        return old

    def _sweep(self) -> None:
        """Remove what runs that died while saving have left."""
        for path in self._folder.glob("step_*.tmp"):
            if _ASIDE.fullmatch(path.name):
                logger.info("removed %s, which a run left unfinished", path)
                shutil.rmtree(path, ignore_errors=True)

    def _choose(self) -> tuple[Path, dict[str, Any]] | None:
        """Find the newest checkpoint that is whole: rank 0 looks, and all check its files."""
        problems = []
        for path in gather_objects(self._saved() if is_main() else [])[0]:
            found = gather_objects(_try_to_read(path) if is_main() else {})[0]
            if isinstance(found, DamageError):
                damage = str(found)
            elif isinstance(found, ValueError):
                raise found
            elif (damage := _find_damage(path, found)) is None:
                return path, found
            problems.append(damage)
            self._damaged.add(path)
            logger.warning("%s is passed over: %s", path, damage)
        if not problems:
            return None
        raise ValueError(
            f"no checkpoint in {self._folder} is whole ({'; '.join(problems)}). Bring one back "
            "from a copy; or, to start from step 0, move that folder away or choose another "
            "--output_dir"
        )

    def _check_vocabulary(self, path: Path) -> None:
        """Refuse a vocabulary whose ids mean other pieces: whatever is accepted."""
        saved = path / "spm.model"
        if saved.read_bytes() == self._vocab_file.read_bytes():
            return
        if found := first_difference(DebertaTokenizer(self._vocab_file), DebertaTokenizer(saved)):
            number, ours, theirs = found
            raise ValueError(
                f"the vocabularies must be the same; id {number} is {ours!r} in "
                f"{self._vocab_file} and {theirs!r} in {saved}. Resume with data of the "
                f"checkpoint's vocabulary (prepare_data.py --vocab {saved}), or start a new run "
                "with another --output_dir."
            )

    def _check_identity(self, path: Path, saved: Mapping[str, Any]) -> dict[str, str]:
        """Return the accepted changes, name -> text."""
        then, now = _compared(saved), _compared(self._identity)
        found = {
            name: "; ".join(_differences(name, then[name], now.get(name))) for name in sorted(then)
        }
        different = {name: text for name, text in found.items() if text}
        refused = [name for name in different if name not in self._accepted]
        if not refused:
            return different
        changeable = [name for name in refused if name not in FIXED]
        advice = f"--accept_changes {' '.join(changeable)}" if changeable == refused else ""
        raise ValueError(
            f"{path} was saved with other settings ({'; '.join(different[n] for n in refused)}). "
            "Resume with the same ones, "
            + (f"go on with the new ones by {advice}, " if advice else "")
            + "or start a new run with another --output_dir."
        )

    def _warn_of_little_space(self, engines: Mapping[str, Saveable]) -> None:
        """Tell at the start what would fail hours later."""
        if not is_main():
            return
        place = next(p for p in (self._folder, *self._folder.parents) if p.exists())
        weights = sum(engine.state().num_bytes(WEIGHTS) for engine in engines.values())
        needed = weights * _STATES_OF_ADAM
        free = shutil.disk_usage(place).free
        if free < needed:
            logger.warning(
                "%s are free in %s, and a checkpoint takes about %s: make room before the first",
                *(_gib(free), place, _gib(needed)),
            )


def read_description(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's checkpoint.json says.

    Raises:
        ValueError: not a checkpoint, or one of another format version.
        DamageError: it is not what was written.
    """
    file = checkpoint / "checkpoint.json"
    if not file.is_file():
        raise DamageError(f"{checkpoint} is no checkpoint: it holds no checkpoint.json")
    try:
        description = json.loads(file.read_bytes())
        is_whole = description.get("sha256") == _digest(description)
    except (ValueError, AttributeError, RecursionError):
        raise DamageError(f"{file} is damaged: it is no JSON") from None
    version = description.get("format_version")
    if "sha256" in description and not is_whole:
        raise DamageError(f"{file} is damaged: it has another sha256 than it says")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, this program reads {FORMAT_VERSION}. Go on with "
            "the version of this program that wrote it, or start anew in another --output_dir"
        )
    if not is_whole:
        raise DamageError(f"{file} is damaged: it lacks its sha256")
    return description


def check_files(checkpoint: Path, files: Mapping[str, Any], *, sizes_only: bool = False) -> None:
    """Compare files with what checkpoint.json says of them.

    Args:
        checkpoint: a checkpoint's folder.
        files: of its description, all or some of them.
        sizes_only: do not read them.

    Raises:
        DamageError: one is missing or another; named.
    """
    for name, facts in files.items():
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != facts["size"]:
                raise DamageError(f"{file} has {size} bytes, and had {facts['size']}")
            if not sizes_only and sha256(file) != facts["sha256"]:
                raise DamageError(f"{file} has another sha256 than when it was written")
        except OSError as error:
            raise DamageError(f"{file} can not be read: {error.strerror}") from None


@dataclass(frozen=True)
class _Unfinished:
    """A checkpoint whose files are being written, or are."""

    final: Path
    aside: Path
    state: Mapping[str, Any]
    numbers: Mapping[str, Any]
    files: Future[dict[str, Any]]
    """Of this rank."""


def _gather_shares(states: Mapping[str, ModelState], *, copies: bool) -> Iterator[Share]:
    """Give this rank its shares of all models, each file under its model's folder."""
    for name, state in states.items():
        for share in gather_shares(state, rank=rank(), world_size=world_size(), copies=copies):
            yield replace(share, file=f"{name}/{share.file}")


def _start(action: Callable[[], _T], *, in_background: bool) -> Future[_T]:
    """Run something, in a thread if it is to be in the background."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except Exception as error:  # for whoever asks for the result
            outcome.set_exception(error)

    if in_background:
        # A daemon: where the disk hangs, the process can end all the same.
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
    else:
        run()
    return outcome


@contextmanager
def _all_or_nothing(final: Path, aside: Path) -> Iterator[None]:
    """Where a step of a save fails, leave nothing of it, and say which save that was."""
    try:
        yield
    except SaveError as error:
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
        raise SaveError(f"{final} could not be written: {error}") from None


def _together(action: Callable[[], _T]) -> list[_T]:
    """Do something on every rank; return what it gave, by rank.

    Raises:
        SaveError: on every rank, if it failed on one.
    """
    result, problem = None, None
    try:
        result = action()
    except OSError as error:
        problem = f"{error} (rank {rank()})"
    outcomes = gather_objects((result, problem))
    if problems := [problem for _, problem in outcomes if problem]:
        raise SaveError("; ".join(problems))
    return [cast(_T, result) for result, _ in outcomes]


def _remove(path: Path) -> None:
    """Delete a checkpoint, such that no kill leaves half of it under its name."""
    aside = path.with_suffix(".old.tmp")
    try:
        os.rename(path, aside)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error.strerror)
    shutil.rmtree(aside, ignore_errors=True)


def _find_damage(path: Path, description: Mapping[str, Any]) -> str | None:
    """Check a checkpoint's files, each on one rank; return what is wrong, the same on all."""
    ranks = len(gather_objects(None))  # that are there, not only planned
    mine = sorted(description["files"])[rank() :: ranks]
    damage = None
    try:
        check_files(path, {name: description["files"][name] for name in mine})
    except DamageError as error:
        damage = str(error)
    return next((found for found in gather_objects(damage) if found), None)


def _looks_whole(path: Path) -> bool:
    try:
        check_files(path, read_description(path)["files"], sizes_only=True)
    except ValueError:
        return False
    return True


def _try_to_read(path: Path) -> dict[str, Any] | ValueError:
    try:
        return read_description(path)
    except ValueError as error:
        return error


def _digest(description: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in description.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _compared(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a resume compares, of those that a checkpoint says.

    Not what only a fresh model's weights depend on; nor the clipping of a checkpoint that says
    only that the DeepSpeed JSON had it.
    """
    models = {
        name: {key: value for key, value in config.items() if key != "initializer_range"}
        for name, config in identity.get("models", {}).items()
    }
    said = {k: v for k, v in identity.items() if (k, v) != ("max_grad_norm", None)}
    return said | {"models": models}


def _differences(name: str, then: Any, now: Any) -> Iterator[str]:
    """What is no longer as it was; what an older program did not write down is left out."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then):
            yield from _differences(f"{name}.{key}", then[key], now.get(key))
    elif then != now:
        yield f"{name}: {then!r} then, {now!r} now"


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ; a flag that the older program did not have is left out."""
    flags = [then.get("flags", {}), now.get("flags", {})]
    pairs = {name: (flags[0][name], flags[1][name]) for name in flags[0] if name in flags[1]}
    if "deepspeed" in then:
        old, new = (dict(_flat("deepspeed", each["deepspeed"])) for each in (then, now))
        pairs |= {name: (old.get(name), new.get(name)) for name in sorted(old | new)}
    return [
        f"{name} {_readable(old)} -> {_readable(new)}"
        for name, (old, new) in pairs.items()
        if old != new
    ]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    else:
        yield name, value


def _readable(value: Any) -> str:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_whole else json.dumps(value) if value is not None else "none"


def _listed(facts: Mapping[str, Any], names: Collection[str]) -> str:
    return ", ".join(f"{name} {facts.get(name)}" for name in names)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
