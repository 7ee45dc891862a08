"""Read a MediaWiki dump: stream its articles, and turn their markup into prose with gensim."""

import re
from collections.abc import Iterator
from html import unescape
from typing import IO
from xml.etree.ElementTree import ParseError, iterparse

TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}(?!\})).)*\|\}(?!\})", re.DOTALL)  # innermost
FILE = re.compile(r"\[\[(?:File|Image):[^\[\]]*(?:\]\])?")
FILE_OPTION = re.compile(
    r"\|\s*(?:thumb|frame|frameless|border|left|right|center|none|upright[=.\d\s]*|[x\d]+px"
    r"|(?:alt|link)=[^|\]]*)\s*(?=\||\]\])"
)
STYLE = re.compile(r"'{2,5}|__[A-Z]+__")  # ''italic'', '''bold''', __NOTOC__
LEFT_OVER = re.compile(
    r"^[^|\n]*\.(?i:jpe?g|png|gif|svg|tiff?)\s*(?:\||$)"  # a file's name before its caption
    r"|^(?:File|Image):.*|^:*[x\d]+px$"
    r"|\|(?:thumb\b|[x\d]+px|alt=.*)"  # after a caption with links in it
    r"| *\((?:[\s,;:]|\b(?:or|and)\b)*\)"  # brackets around nothing but templates
    r"|(?<=\()[\s,;:]+"  # a template stood first in the brackets
    r"|[ \xa0]+(?=[ \xa0,;)])",  # or before a comma
    re.MULTILINE,
)
HEADING = re.compile(r"(={1,6})\s*(.+?)\s*\1$")
LIST_MARKS = "*#:; \t"


def read_articles(stream: IO[bytes]) -> Iterator[str]:
    """Yield the markup of each article, leaving out redirects, other namespaces and blank pages.

    As gensim's `extract_pages`, which however keeps some 90 bytes of every page for ever: 2 GB for
    a full English dump.
    """
    root = None
    for event, element in iterparse(stream, events=("start", "end")):
        if root is None:
            root = element
            if not root.tag.endswith("}mediawiki"):
                raise ParseError(f"the outermost element must be <mediawiki>; it is <{root.tag}>")
        if event == "end" and element.tag.endswith("}page"):
            is_article = element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None
            if is_article and (text := element.findtext("{*}revision/{*}text")):
                yield text
            root.clear()


def clean_markup(text: str) -> str:
    """Turn an article's markup into prose: a paragraph, list item or heading to a line.

    Templates, tables, footnotes, categories and lines without a word are dropped, and so are
    headings that are left without text.
    """
    try:
        from gensim.corpora.wikicorpus import remove_markup
    except ImportError:
        raise ValueError("MediaWiki dumps need gensim; install it: pip install gensim") from None
    has_tables = True
    while has_tables:
        text, has_tables = TABLE.subn("", text)
    text = FILE.sub(_keep_caption, text)
    text = unescape(remove_markup(text))  # entities last: "&lt;" starts no tag
    text = LEFT_OVER.sub("", STYLE.sub("", text))
    lines: list[str] = []
    next_depth = 1  # of the heading that follows, 0: text follows; the end is like a new article
    for line in reversed(text.splitlines()):
        if heading := HEADING.match(line.strip()):
            if 0 < next_depth <= len(heading[1]):
                continue
            next_depth = len(heading[1])
            lines.append(heading[2])
        elif any(map(str.isalnum, line)):
            next_depth = 0
            lines.append(line.strip(LIST_MARKS))
    return "\n".join(reversed(lines))


def _keep_caption(file: re.Match[str]) -> str:
    """Leave the last part of a file link, its caption, to gensim, which keeps whatever is last."""
    link = FILE_OPTION.sub("", file[0])
    return link if "|" in link else ""
