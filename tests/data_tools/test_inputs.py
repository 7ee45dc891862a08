"""An input names files: whole folders, globs, links, and nothing that nobody meant."""

from pathlib import Path

import pytest
from inputs import find_files


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files that inputs name, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *inputs: [str(file) for file in find_files(inputs).files]


def test_folders_are_searched_and_what_is_left_out_is_known(tmp_path: Path, names):
    write(tmp_path, "b.txt", "a.jsonl.gz", "deep/er/c.parquet", "README.md", "deep/x.bin")
    assert names(".") == ["a.jsonl.gz", "b.txt", "deep/er/c.parquet"]
    found = find_files(["."])
    assert {file.name for file in found.of_other_kinds} == {"README.md", "x.bin"}
    assert found.left_out() == ["left out 2 files of other kinds: README.md, ..."]
    assert names("*.txt") == ["b.txt"]
    assert names("de*") == ["deep/er/c.parquet"]


FOUR = ["in/a/b/c/four.jsonl", "in/a/b/three.jsonl", "in/a/two.jsonl", "in/one.jsonl"]


@pytest.mark.parametrize("root", ["in", "in/[x]"])
def test_two_stars_are_all_folders(tmp_path: Path, names, root: str):
    files = [name.replace("in/", f"{root}/", 1) for name in FOUR]
    write(tmp_path, *files, f"{root}/a/text.txt")
    begin = root.replace("[", "[[]")
    assert names(f"{begin}/**/*.jsonl") == files
    assert names(f"**/{begin}/**/b/**/*.jsonl") == files[:2]
    assert names(f"{begin}/**/b") == files[:2]
    assert names(f"{begin}/**") == names(root) == names(f"{begin}/**/*")
    assert len(names(root)) == 5
    assert names(f"{tmp_path}/{begin}/**/*.jsonl") == [f"{tmp_path}/{file}" for file in files]
    assert names(f"{begin}/a/b**/*.jsonl") == files[1:2]  # as one star


def test_links_are_followed_and_no_file_is_read_twice(tmp_path: Path, names):
    write(tmp_path, "elsewhere/x.txt", "elsewhere/deep/y.txt", "in/real/z.txt")
    (tmp_path / "in/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/again").symlink_to("real")  # is read under its own name
    (tmp_path / "in/loop").symlink_to("..")
    (tmp_path / "elsewhere/deep/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/real/z_too.txt").symlink_to("z.txt")
    expected = ["in/far/deep/y.txt", "in/far/x.txt", "in/real/z.txt"]
    assert names("in") == expected
    assert names("in/**/*.txt") == expected
    assert names("in/far") == ["in/far/deep/loop/real/z.txt", *expected[:2]]


def test_a_link_to_nowhere_is_an_error(tmp_path: Path, names):
    write(tmp_path, "in/a.txt")
    (tmp_path / "in/b.txt").symlink_to("/gone/b.txt")
    with pytest.raises(FileNotFoundError, match=r"in/b\.txt"):
        names("in")


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path: Path, names):
    write(tmp_path, "in/a.jsonl", "in/._a.jsonl", "in/.ipynb_checkpoints/a-checkpoint.jsonl")
    for whole in ("in", "in/**/*.jsonl", "in/**"):
        assert names(whole) == ["in/a.jsonl"]
        said = "left out 2 hidden files and folders: in/._a.jsonl, ..."
        assert find_files([whole]).left_out() == [said]
    assert names("in/.ipynb_checkpoints") == ["in/.ipynb_checkpoints/a-checkpoint.jsonl"]
    assert names("in/._a.jsonl") == names("in/.*.jsonl") == ["in/._a.jsonl"]
    assert names("in/**/.*/*.jsonl") == ["in/.ipynb_checkpoints/a-checkpoint.jsonl"]
    (tmp_path / "in/a.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="left out 2 hidden files"):
        names("in")


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path):
    write(tmp_path, "a.txt", "caf\udce9")
    (line,) = find_files([str(tmp_path)]).left_out()
    assert line.encode().endswith(b"caf\\udce9")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("gone/**/*.txt", None, "no such file"),
        ("a.txt", b"", "is empty"),
        ("a.pdf", b"x", "must end in"),
    ],
)
def test_unusable_inputs_are_errors(tmp_path: Path, name: str, content: bytes, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_files([str(tmp_path / name)])


def test_a_folder_without_text_is_an_error(tmp_path: Path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(FileNotFoundError, match="no folder with"):
        find_files([str(tmp_path)])
