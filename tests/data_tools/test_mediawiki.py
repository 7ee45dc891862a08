"""Wikipedia's markup comes out as prose, in memory that does not grow with the dump."""

import bz2
import io
import re
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import pytest
from download import SAMPLE
from mediawiki import clean_markup, read_articles

from tests.data_tools.dumps import dump

pytest.importorskip("gensim")

ARTICLE = """{{Infobox person
| name = Ann {{nowrap|Lee}}
}}
[[File:Ann.jpg|thumb|upright=1.2|Ann in 1901|alt=A portrait]]
'''Ann Lee''' ({{IPA|an}}; {{lang|fr|x}} or {{lang|de|y}}) was a ''writer''.<ref name="a">Cite</ref>
She met [[Bob Ray|Bob]] at [http://example.org the fair].<ref name="a" /> __NOTOC__

== Life ==
{{Main|Life of Ann}}
{| class="wikitable" style="x"
! Year !! Book
|-
| 1899 || {{yes}} ''First''
{| inner table
| cell
|}
|}
* A first item, a &lt; b&nbsp;c
*# {{cite book|title=x}}
; Term : meaning

=== Empty ===
==== Emptier ====

== Works ==
=== Novels ===
Two novels.
<gallery>
File:One.jpg|First ''cover''
Two.png|Second cover
</gallery>

== References ==
{{reflist}}

[[Category:Writers]]
[[de:Ann Lee]]
"""
PROSE = """Ann in 1901
Ann Lee was a writer.
She met Bob at the fair.
Life
A first item, a < b\u00a0c
Term : meaning
Works
Novels
Two novels.
First cover
Second cover"""


def test_markup_becomes_prose():
    lines = [line.rstrip() for line in clean_markup(ARTICLE).split("\n")]
    assert "\n".join(lines) == PROSE


def test_a_page_of_markup_alone_is_empty():
    assert clean_markup("{{disambig}}\n== See also ==\n* {{x}}\n[[Category:X]]") == ""


def test_broken_markup_keeps_its_text():
    assert clean_markup("Before {| never closed\n\nAfter ''half") == "Before\nAfter half"


def test_the_sample_dump_comes_out_clean():
    gensim = find_spec("gensim")
    assert gensim is not None
    assert gensim.origin is not None
    sample = Path(gensim.origin).parent / "test" / "test_data" / SAMPLE
    with bz2.open(sample) as stream:
        articles = list(read_articles(stream))
    assert len(articles) == 106
    text = "\n".join(map(clean_markup, articles[:30]))
    assert len(text) > 800_000
    assert "Anarchism is a political philosophy that advocates self-governed" in text
    for markup in (
        r"\[\[|\]\]",
        r"\{\{|\}\}",
        r"\{\||\|\}",
        "''",
        r"<ref|</",
        r"^=.*=$",
        "&[a-z]+;",
    ):
        assert not re.findall(markup, text, re.MULTILINE), markup
    assert not re.findall(r"^[*#:;]|^\s|\s$|^\W*$|Category:", text, re.MULTILINE)
    assert len(re.findall(r"\||\bthumb\b|\d+px", text)) < 10


def test_articles_are_not_kept():
    page = ("0", "", "some text")
    stream = io.BytesIO(dump(*[page] * 20_000))
    articles = read_articles(stream)
    next(articles)
    tracemalloc.start()
    assert sum(1 for _ in articles) == 19_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000  # 25 bytes per page
