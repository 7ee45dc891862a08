"""Every format gives the documents that were put in; what cannot be read is an error."""

import bz2
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import PIECE, cut_text, parse, read_records, read_texts

from tests.data_tools.dumps import dump

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
}
DOCUMENTS = ["One line.", "Two\n\nlines, caf\u00e9 \U0001f600.", "", "Three."]


def documents(path: Path, text_field: str = "text", parted_by: str = "file") -> list[str]:
    """The documents of a file, each put together from its records."""
    found: list[str] = []
    with path.open("rb") as raw:
        for record in read_records(raw, text_field=text_field, documents=parted_by):
            text = parse(record, text_field=text_field)
            if record.starts_document:
                found.append(text)
            else:
                found[-1] += text
    return found


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_text_file_is_one_document_with_its_blank_lines(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.txt{suffix}"
    text = "\n\n".join(DOCUMENTS) + "\r\n"
    path.write_bytes(COMPRESSIONS[suffix](b"\xef\xbb\xbf" + text.encode()))
    assert documents(path) == [text]  # without the byte order mark


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_or_line_ends_can_part_documents(tmp_path: Path, suffix: str, end: str):
    path = tmp_path / f"a.txt{suffix}"
    lines = ["", "One", "goes on.", "", "", "Two, caf\u00e9.", " \t\xa0", "Three.", ""]
    path.write_bytes(COMPRESSIONS[suffix](b"\xef\xbb\xbf" + end.join(lines).encode()))
    parted = [text.split() for text in documents(path, parted_by="blank_line")]
    assert parted == [["One", "goes", "on."], ["Two,", "caf\u00e9."], ["Three."]]
    parted = [text.split() for text in documents(path, parted_by="line")]
    assert parted == [["One"], ["goes", "on."], ["Two,", "caf\u00e9."], ["Three."]]


@pytest.mark.parametrize("parted_by", ["blank_line", "line"])
def test_borders_are_found_wherever_a_piece_ends(tmp_path: Path, small_pieces: int, parted_by: str):
    rng = random.Random(0)
    path = tmp_path / "a.txt"
    border = r"\n\s*\n" if parted_by == "blank_line" else r"\n"
    for _ in range(300):
        text = "".join(rng.choices("ab\u4e2d\r \n", weights=[4, 4, 4, 1, 3, 3], k=200))
        text += "x" * 3 * small_pieces + " " * rng.randint(0, 3 * small_pieces) + rng.choice("\nx")
        path.write_bytes(text.encode())
        expected = [part.split() for part in re.split(border, text) if part.strip()]
        found = [part.split() for part in documents(path, parted_by=parted_by)]
        assert ["".join(words) for words in found] == ["".join(words) for words in expected]


def test_a_gigantic_gap_between_documents_is_not_held_in_memory(tmp_path: Path, small_pieces: int):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one" + b" " * 5000 + b"\n" + b" " * 5000 + b"\n" + b" " * 5000 + b"two")
    with path.open("rb") as raw:
        records = list(read_records(raw, text_field="text", documents="blank_line"))
    assert [record.starts_document for record in records] == [True, True]
    assert max(len(record.raw) for record in records) <= small_pieces + 2


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_json_lines_hold_a_document_each(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](json_lines(DOCUMENTS, "body") + b"\n"))
    assert documents(path, "body") == [*DOCUMENTS, ""]  # the blank line is an empty document


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["tokens", "raw"])
def test_wikitext_articles_begin_at_first_level_headings(tmp_path: Path, kind: str, suffix: str):
    first = " \n = Homarus gammarus = \n \n A lobster . \n \n = = Description = = \n \n Blue . \n"
    second = " \n = F = m a = \n \n = = = Deep = = = \n Text \n = 2 = \n goes on . \n"
    path = tmp_path / f"wiki.{kind}{suffix}"
    path.write_bytes(COMPRESSIONS[suffix]((first + second).encode()))
    # The blank line before a heading is still the earlier article's.
    assert documents(path) == [first + " \n", second.removeprefix(" \n")]


@pytest.mark.parametrize("name", ["d.xml", "d.xml.bz2", "d.xml.gz", "d.xml-p1p30302-short.bz2"])
def test_a_dump_gives_its_articles_without_redirects_and_talk(tmp_path: Path, name: str):
    content = dump(
        ("0", "", "'''Bold''' &amp;amp; [[link|text]]."),
        ("0", '<redirect title="B"/>', "#REDIRECT [[B]]"),
        ("1", "", "Talk."),
        ("0", "", ""),
        ("0", "", "Last."),
    )
    path = tmp_path / name
    path.write_bytes(COMPRESSIONS[path.suffix if path.suffix != ".xml" else ""](content))
    pytest.importorskip("gensim")
    assert documents(path) == ["Bold & text.", "Last."]


def test_parquet_rows_are_documents(tmp_path: Path):
    texts = DOCUMENTS * 100
    table = pa.table({"id": list(range(len(texts))), "body": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    assert documents(tmp_path / "a.parquet", "body") == texts


@pytest.mark.parametrize("name", ["a.txt", "a.raw"])
def test_a_long_document_comes_in_pieces(tmp_path: Path, small_pieces: int, name: str):
    text = "".join(f"line {i} is \u4e2d\u6587 \U0001f600\n" for i in range(50)) + "x" * 100
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with path.open("rb") as raw:
        records = list(read_records(raw, text_field="text"))
    pieces = [parse(record, text_field="text") for record in records]
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert [record.starts_document for record in records] == [True] + [False] * (len(pieces) - 1)
    if name == "a.txt":
        assert max(map(len, pieces)) <= small_pieces
    assert sum(piece.endswith("\n") for piece in pieces) >= 50 * small_pieces // 32


def test_cutting_loses_nothing_and_prefers_line_ends(small_pieces: int):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab\u4e2d \n", weights=[9, 9, 9, 2, 1], k=rng.randint(0, 200)))
        *pieces, last = cut_text(text)
        assert "".join([*pieces, last]) == text
        assert len(last) <= small_pieces
        for piece in pieces:
            if not piece.endswith("\n"):
                assert "\n" not in piece
                assert piece.endswith(" ") or (" " not in piece and len(piece) == small_pieces)


def test_a_text_without_a_space_is_cut_at_the_limit():
    assert [len(piece) for piece in cut_text("x" * (50 * PIECE + 1))] == [PIECE] * 50 + [1]


def test_texts_of_many_files_come_in_order_with_the_bytes_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["1", "2"]))
    (tmp_path / "b.txt").write_text("3")
    shown: list[int] = []
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    assert list(read_texts(files, text_field="text", show=shown.append)) == ["1", "2", "3"]
    assert shown == sorted(shown)
    assert shown[-1] == sum(file.stat().st_size for file in files)


def test_progress_is_in_bytes_of_the_file(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(["x"] * 100_000)))
    with path.open("rb") as raw:
        records = read_records(raw, text_field="text")
        next(records)
        assert 0 < raw.tell() <= path.stat().st_size
        assert sum(1 for _ in records) == 99_999
        assert raw.tell() == path.stat().st_size


def _parquet(columns: dict[str, object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _parquet_twice() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text"] * 2), sink)
    return sink.getvalue().to_pybytes()


def _parquet_bytes(value: bytes) -> bytes:
    """One row of a column that says that it is text."""
    offsets = pa.array([0, len(value)], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(value)])
    return _parquet({"text": column})


GOOD = json_lines(["word " * 200] * 200)
LINE = json_lines(["x"])
BROKEN = {
    "cut short gzip": ("a.jsonl.gz", gzip.compress(GOOD)[:-20], "cut short"),
    "corrupt gzip": ("a.txt.gz", gzip.compress(GOOD)[:60] + b"\0" * 90, "damaged"),
    "cut short bzip2": ("a.txt.bz2", bz2.compress(GOOD)[:-20], "cut short"),
    "cut short dump": ("a.xml", dump(("0", "", "x"))[:-20], "cut short"),
    "cut short parquet": ("a.parquet", _parquet({"text": ["x"]})[:-20], "cut short"),
    "not gzip": ("a.txt.gz", GOOD, "no text file"),
    "not bzip2": ("a.txt.bz2", GOOD, "no text file"),
    "not a dump": ("a.xml", b"<html><p>x</p></html>", "<mediawiki>; it is <html>"),
    "not xml": ("a.xml", b"text", "no mediawiki file"),
    "not parquet": ("a.parquet", GOOD, "no parquet file"),
    "a column name twice": ("a.parquet", _parquet_twice(), "one column 'text'; it has 2"),
    "not UTF-8 in parquet": ("a.parquet", _parquet_bytes(b"a\xff"), "row 0: byte 1 of 'text'"),
    "no such column": ("a.parquet", _parquet({"body": ["x"]}), "columns are body"),
    "column of numbers": ("a.parquet", _parquet({"text": [1]}), "of text"),
    "null in a row": ("a.parquet", _parquet({"text": ["x", None]}), "row 1: 'text' must hold"),
    "nothing inside": ("a.txt.gz", gzip.compress(b""), "holds no documents"),
    "not UTF-8 text": ("a.txt", b"x" * 300_000 + b"\xff", "a.txt: byte 300000 .*not UTF-8"),
    "UTF-8 cut short": ("a.txt", "caf\u00e9".encode()[:-1], "byte 3 .*not UTF-8"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "byte 0 .*not UTF-8"),
    "not UTF-8 articles": ("a.raw", b" = A = \n\n x\n\n = B = \n\xff", "byte 21 .*not UTF-8"),
    "not UTF-8 JSON": ("a.jsonl", LINE + b'{"text": "\xff"}\n', "line 2: byte 10 of the line"),
    "not JSON": ("a.jsonl", LINE * 2 + b"{'text'}\n", "line 3: not JSON"),
    "JSON in JSON in JSON": ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    "JSON cut short": ("a.jsonl", LINE + LINE[:-4], "line 2: not JSON"),
    "no such field": ("a.jsonl", LINE + b'{"body": "x"}\n', "line 2: .*found body.*--text_field"),
    "field of numbers": ("a.jsonl", b'{"text": 1}\n', "line 1: must be an object with text"),
    "not an object": ("a.jsonl", b'["text"]\n', "line 1: .*found list"),
    "hundreds of fields": (
        "a.jsonl",
        json.dumps({f"field\n{i}": 1 for i in range(500)}).encode(),
        r"found field 0, .*field 19, \.\.\.\. Name",
    ),
    "lone surrogate": ("a.jsonl", LINE + b'{"text": "a\\ud800"}', r"line 2: character 1 .*ud800"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_an_error_with_a_place(tmp_path: Path, case: str):
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"(?s){name}.*{message}" if "byte" not in message else message
    ):
        list(read_texts([tmp_path / name], text_field="text"))


def test_paired_surrogates_and_nul_are_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00\\u0000"}')
    assert documents(tmp_path / "a.jsonl") == ["\U0001f600\0"]
