"""Find the files that an input names: a file, a folder, or a glob in quotes.

A folder is searched to the bottom, and so are the folders that `**` in a glob stands for; links to
folders are followed. A file is read once, whatever links lead to it. Hidden files and folders (the
name begins with a dot) are left out unless the input names them: editors, notebooks and archives
leave copies there.
"""

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import escape, glob
from pathlib import Path

from sources import KNOWN, kind_of

GLOBSTAR = re.compile(r"(?:^|(?<=/))\*\*(?:/+|$)")


@dataclass
class Found:
    """The files to read, and what was left out on the way to them."""

    files: list[Path] = field(default_factory=list)
    of_other_kinds: dict[Path, None] = field(default_factory=dict)
    hidden: dict[Path, None] = field(default_factory=dict)

    def left_out(self) -> list[str]:
        """Say what was left out, a line for each reason."""
        reasons = (
            (self.of_other_kinds, "file of another kind", "files of other kinds"),
            (self.hidden, "hidden file or folder", "hidden files and folders"),
        )
        return [
            f"left out {len(paths):,} {many if len(paths) > 1 else one}: "
            f"{printable(next(iter(paths)))}{', ...' if len(paths) > 1 else ''}"
            for paths, one, many in reasons
            if paths
        ]


def find_files(inputs: Iterable[str]) -> Found:
    """Return the files that `inputs` name, those of one input sorted."""
    found = Found()
    for name in inputs:
        files: dict[str, Path] = {}
        for path in [Path(name)] if Path(name).exists() else _expand(name, found):
            for file in _files_in(path, found) if path.is_dir() else [path]:
                files.setdefault(os.path.realpath(file), file)
        if not files:
            left_out = "; ".join(["", *found.left_out()])
            raise FileNotFoundError(
                f"{name}: no such file, and no folder with {KNOWN} files{left_out}"
            )
        found.files += files.values()
    if found.hidden:  # but an input may name what is in a hidden folder, and what is beside it
        named = {part for file in found.files for part in (file, *file.parents)}
        found.hidden = {path: None for path in found.hidden if path not in named}
    for file in found.files:
        if not kind_of(file.name):
            raise ValueError(f"{file}: the name must end in {KNOWN}; rename or convert it")
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
    return found


def printable(path: Path) -> str:
    """Return a path as text that every stream takes: the names of files need not be UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()


def _expand(pattern: str, found: Found) -> list[Path]:
    """Return what a glob names; `**` is any number of folders, as in bash with globstar."""
    star = GLOBSTAR.search(pattern)
    if star is None:
        return [Path(name) for name in sorted(glob(pattern))]
    before, after = pattern[: star.start()], pattern[star.end() :]
    roots = [Path(name) for name in sorted(glob(before))] if before else [Path()]
    if not after:
        return roots  # folders are searched to the bottom
    names: set[Path] = set()
    for root in roots:
        for folder, _ in _walk(root, found):
            names.update(_expand(os.path.join(escape(str(folder)), after), found))
    return sorted(names)


def _files_in(top: Path, found: Found) -> list[Path]:
    files: dict[str, Path] = {}
    for _, inside in _walk(top, found):
        for file in inside:
            # A link that leads nowhere stays, to be an error: perhaps a disk is not there.
            if kind_of(file.name) and (file.is_file() or not file.exists()):
                files.setdefault(os.path.realpath(file), file)
            else:
                found.of_other_kinds[file] = None
    return sorted(files.values())


def _walk(top: Path, found: Found) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder under `top` once, with all in it but folders; those behind links last."""
    seen: set[tuple[int, int]] = set()
    folders, links = deque([top]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        identity = folder.stat()
        if (identity.st_dev, identity.st_ino) in seen:
            continue
        seen.add((identity.st_dev, identity.st_ino))
        files: list[Path] = []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = folder / entry.name
                if entry.name.startswith("."):
                    found.hidden[path] = None
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                else:
                    files.append(path)
        yield folder, files
