"""Stream documents out of text files, in memory that does not grow with them.

A file's name says what it is; `.gz` or `.bz2` may follow, but for Parquet:

    .txt             plain text: --documents says what a document is: the file (the default), what
                     stands between blank lines, or a line
    .tokens .raw     WikiText: a document begins at a title line, ` = Title = `
    .jsonl           JSON lines: a document per line, in one field of an object
    .xml             MediaWiki dump, also `.xml-p1p41242.bz2`: the articles, not redirects or talk
    .parquet         a document per row, in one column

Reading has two halves. `read_records` cuts a file into raw records, which is cheap. `parse` makes
text of a record, which is not, so it can run in many processes.
"""

import bz2
import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree.ElementTree import ParseError

import pyarrow as pa
import pyarrow.parquet as pq
from mediawiki import clean_markup, read_articles

SHOWN_NAMES = 20  # of fields or columns, in an error
PIECE = 1 << 18  # characters: longer texts are handled in pieces
KINDS = {
    "text": re.compile(r"\.txt(\.gz|\.bz2)?$"),
    "wikitext": re.compile(r"\.(tokens|raw)(\.gz|\.bz2)?$"),
    "jsonl": re.compile(r"\.jsonl(\.gz|\.bz2)?$"),
    "mediawiki": re.compile(r"\.xml(-[^.]*)?(\.gz|\.bz2)?$"),
    "parquet": re.compile(r"\.parquet$"),
}
KNOWN = ".txt, .tokens, .raw, .jsonl or .xml (also with .gz or .bz2), or .parquet"
DOCUMENTS = {  # of plain text: what parts two of them
    "file": None,
    "blank_line": re.compile(r"\n\s*\n"),
    "line": re.compile(r"\n"),
}
TITLE = re.compile(rb" ?= (?!= ).*(?<! =) = ?\r?$")


class Record(NamedTuple):
    """A raw part of a file.

    Attributes:
        path: The file.
        place: Where it starts: a line of JSON lines (from 1), a byte of WikiText, else a count.
        starts_document: False if it goes on with the document of the record before.
        raw: What `parse` makes text of.
    """

    path: str
    place: int
    starts_document: bool
    raw: str | bytes


@lru_cache
def kind_of(path: str) -> str | None:
    """Return the kind of a file by its name, None if unknown."""
    return next((kind for kind, name in KINDS.items() if name.search(path)), None)


def read_records(raw: IO[bytes], *, text_field: str, documents: str = "file") -> Iterator[Record]:
    """Cut an open file into records. `raw.tell()` says how far that has come."""
    path = str(raw.name)
    kind = kind_of(path)
    record = None
    try:
        for place, starts_document, content in _read(kind, raw, path, text_field, documents):
            record = Record(path, place, starts_document, content)
            yield record
    except (EOFError, OSError, zlib.error, ParseError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged, cut short or no {kind} file: {reason}") from None
    if record is None and kind != "mediawiki":  # a part of a dump may hold redirects alone
        raise ValueError(f"{path} holds no documents")


def parse(record: Record, *, text_field: str) -> str:
    """Return the text of a record."""
    kind = kind_of(record.path)
    if isinstance(record.raw, str):
        return clean_markup(record.raw) if kind == "mediawiki" else record.raw
    if kind == "jsonl":
        return _parse_json(record.raw, f"{record.path}, line {record.place}", text_field)
    try:
        return record.raw.decode("utf-8" if record.place else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(record.path, record.place + error.start) from None


def read_texts(
    files: Iterable[Path], *, text_field: str, show: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Yield the text of every record of every file; `show` gets the number of bytes read."""
    bytes_read = 0
    for file in files:
        with file.open("rb") as raw:
            for record in read_records(raw, text_field=text_field):
                yield parse(record, text_field=text_field)
                if show:
                    show(bytes_read + raw.tell())
        bytes_read += file.stat().st_size


def cut_text(text: str, size: int | None = None) -> Iterator[str]:
    """Cut a long text into pieces of at most `size` (PIECE) characters.

    That is after a line's end, else at a space, else (a run without either, where one word becomes
    two) anywhere.
    """
    size = size or PIECE
    start = 0
    while len(text) - start > size:
        end = start + size
        cut = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _read(
    kind: str | None, raw: IO[bytes], path: str, text_field: str, documents: str
) -> Iterator[tuple[int, bool, str | bytes]]:
    """Yield place, starts_document and content of each record."""
    if kind == "parquet":
        for row, text in enumerate(_read_parquet(raw, path, text_field)):
            yield row, True, text
        return
    stream = raw
    if path.endswith(".gz"):
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), PIECE)
    elif path.endswith(".bz2"):
        stream = io.BufferedReader(bz2.BZ2File(raw), PIECE)
    if kind == "jsonl":
        for number, line in enumerate(stream, start=1):
            yield number, True, line
    elif kind == "mediawiki":
        for number, markup in enumerate(read_articles(stream)):
            yield number, True, markup
    elif kind == "wikitext":
        yield from _read_wikitext(stream)
    else:
        pieces = _read_text(stream, path)
        border = DOCUMENTS[documents]
        parts = (
            ((number == 0, text) for number, text in enumerate(pieces))
            if border is None
            else _part(pieces, border)
        )
        for number, (starts_document, text) in enumerate(parts):
            yield number, starts_document, text


def _read_text(stream: IO[bytes], path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, offset = "", 0
    while True:
        block = stream.read(PIECE)
        undecoded = len(decoder.getstate()[0])
        try:
            rest += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset - undecoded + error.start) from None
        offset += len(block)
        *pieces, rest = cut_text(rest)
        yield from pieces
        if not block:
            break
    if offset:
        yield rest


def _part(pieces: Iterable[str], border: re.Pattern[str]) -> Iterator[tuple[bool, str]]:
    """Part a text into documents, each in one or more pieces. Blank ones are none.

    White space at the end of a piece waits for the next one: the border may go on there. Of much
    white space only the line ends matter.
    """
    starts_document, space = True, ""
    for piece in pieces:
        text = space + piece
        end = len(text.rstrip())
        space = "\n" * min(2, text.count("\n", end)) or text[end : end + 1]
        for number, part in enumerate(border.split(text[:end])):
            starts_document |= number > 0
            if part and not part.isspace():
                yield starts_document, part
                starts_document = False


def _read_wikitext(stream: IO[bytes]) -> Iterator[tuple[int, bool, bytes]]:
    lines: list[bytes] = []
    place = size = 0
    starts_document = True
    previous, has_text = b"", False
    for line in stream:
        is_title = TITLE.match(line) and not previous.strip() and has_text
        if is_title or size >= PIECE:
            yield place, starts_document, b"".join(lines)
            lines, place, size, starts_document = [], place + size, 0, bool(is_title)
            has_text = has_text and not is_title
        lines.append(line)
        size += len(line)
        previous, has_text = line, has_text or not line.isspace()
    if lines:
        yield place, starts_document, b"".join(lines)


def _read_parquet(raw: IO[bytes], path: str, text_field: str) -> Iterator[str]:
    file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
    schema = file.schema_arrow
    columns = [column for column in schema if column.name == text_field]
    if len(columns) > 1:
        raise ValueError(
            f"{path} must have one column {text_field!r}; it has {len(columns)} of that name. "
            "Rename all but one, or name another column with --text_field."
        )
    if not columns or not (
        pa.types.is_string(columns[0].type) or pa.types.is_large_string(columns[0].type)
    ):
        found = _first(f"{column.name} ({column.type})" for column in schema)
        raise ValueError(
            f"{path} must have a column {text_field!r} of text; its columns are {found}. "
            "Name the right one with --text_field."
        )
    row = 0
    for batch in file.iter_batches(batch_size=64, columns=[text_field], use_threads=False):
        for value in batch.column(0):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, row {row}: byte {error.start} of {text_field!r} is not UTF-8"
                ) from None
            if text is None:
                raise ValueError(f"{path}, row {row}: {text_field!r} must hold text; it is null")
            row += 1
            yield text


def _parse_json(line: bytes, where: str, text_field: str) -> str:
    if line.isspace():
        return ""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(text := fields.get(text_field), str):
        found = _first(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(
            f"{where}: must be an object with text in {text_field!r}; found {found}. "
            "Name the right field with --text_field."
        )
    if rb"\u" in line:  # nothing else makes half a character
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: character {error.start} of the text is half a one: a lone "
                f"surrogate, \\u{ord(text[error.start]):04x}. Repair the line."
            ) from None
    return text


def _first(names: Iterable[str]) -> str:
    """List the first names of fields or columns, on one line."""
    first = [" ".join(name.split()) for name in islice(names, SHOWN_NAMES + 1)]
    return ", ".join(first[:SHOWN_NAMES]) + ", ..." * (len(first) > SHOWN_NAMES)


def _not_utf8(path: str, offset: int) -> ValueError:
    return ValueError(f"{path}: byte {offset} (uncompressed) is not UTF-8; convert the file")
