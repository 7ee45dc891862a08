"""The normalization of a sentencepiece vocabulary, built from the normalizers of Hugging Face.

sentencepiece replaces characters by rules, its "charsmap": a trie of keys, of which it takes the
longest one at each place of the text. `Precompiled` of `tokenizers` reads the same charsmap, but
looks up whole grapheme clusters and takes the shortest key (huggingface/tokenizers#2116): it loses
combining marks and joiners, or leaves them apart. It is right for a character alone. A key of
several characters has the value that Unicode's composition (NFC) gives to the values of its
characters. So the normalizers do this:

1. KEY_END marks where a key ends, if composition could go on there.
2. CHARACTER_END marks where a character ends, if a grapheme cluster could go on there.
3. `Precompiled` replaces each character.
4. CHARACTER_END is removed, and NFC composes what stands between two KEY_ENDs. Keys of letters
   that Unicode composes since a newer version than that of `tokenizers` are replaced one by one.

The result is sentencepiece's, to the character, but for U+FFF0 and U+FFF1, which have no meaning in
Unicode and are removed, and for rules that compose otherwise, of which a log line tells.
"""

import logging
import struct
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from unicodedata import category

import numpy as np
from tokenizers import Regex, normalizers

logger = logging.getLogger("ds_deberta")
KEY_END, CHARACTER_END = "\ufff0", "\ufff1"  # they end a grapheme cluster, and NFC leaves them
_COMPOSE = normalizers.NFC()
# What continues a grapheme cluster: marks, joiners, two vowels, skin colours, tags.
_CONTINUES = r"\p{M}\x{200c}\x{200d}\x{e33}\x{eb3}\x{1f3fb}-\x{1f3ff}\x{e0020}-\x{e007f}"
_HAS_LEAF, _END_OF_KEY, _VALUE = 1 << 8, 1 << 31, (1 << 31) - 1  # bits of a unit of the trie


class CharsMap:
    """A `precompiled_charsmap`: a trie over UTF-8 bytes, as a double array of darts-clone.

    Nodes are positions in the array; the root is 0. Different keys share nodes.
    """

    def __init__(self, charsmap: bytes):
        (size,) = struct.unpack_from("<I", charsmap)
        self._units = np.frombuffer(charsmap, "<u4", size // 4, offset=4).tolist()
        self._values = charsmap[4 + size :]
        self._bytes: dict[int, list[int]] = {}  # by the base of their parent
        for node, unit in enumerate(self._units):
            if not unit & _END_OF_KEY and unit & 0xFF:
                self._bytes.setdefault(node ^ (unit & 0xFF), []).append(node)
        self.children = cache(self._children)
        self.suffixes = cache(self._suffixes)

    def value(self, node: int) -> str | None:
        """Return what the key that ends at a node becomes; None if none ends there."""
        if not self._units[node] & _HAS_LEAF:
            return None
        start = self._units[self._base(node)] & _VALUE
        return self._values[start : self._values.index(b"\0", start)].decode()

    def _suffixes(self, node: int) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for character, child in self.children(node).items():
            value = self.value(child)
            if value is not None:
                found.append((character, value))
            found += [(character + suffix, value) for suffix, value in self.suffixes(child)]
        return found

    def _children(self, node: int) -> dict[str, int]:
        """Return the nodes that one more character leads to."""
        found: dict[str, int] = {}
        stack = [(node, b"")]
        while stack:
            parent, key = stack.pop()
            for child in self._bytes.get(self._base(parent), ()):
                longer = key + bytes([self._units[child] & 0xFF])
                if len(longer) == _utf8_length(longer[0]):
                    found[longer.decode()] = child
                else:
                    stack.append((child, longer))
        return found

    def _base(self, node: int) -> int:
        unit = self._units[node]
        return node ^ (unit >> 10 << ((unit & 1 << 9) >> 6))


def build_normalizer(charsmap: bytes) -> normalizers.Normalizer:
    """Build the normalizers that do what sentencepiece does with a charsmap."""
    key, continues, replacements = _read_rules(charsmap)
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(rf"(?=\O{continues})(?>{key}|\O)\K"), KEY_END),
            normalizers.Replace(Regex(rf"(?<=\O)(?={continues})"), CHARACTER_END),
            normalizers.Precompiled(charsmap),
            normalizers.Replace(CHARACTER_END, ""),
            _COMPOSE,
            *(normalizers.Replace(old, new) for old, new in replacements),
            normalizers.Replace(KEY_END, ""),
        ]
    )


@cache
def _read_rules(charsmap: bytes) -> tuple[str, str, list[tuple[str, str]]]:
    """Return what the normalizers need to know of a charsmap.

    Returns:
        Regular expressions of a longest key of several characters and of a character that may
        follow one, and the keys that composition leaves as they are, with their values.
    """
    rules = CharsMap(charsmap)
    values = dict(rules.suffixes(0))
    long = [key for key in values if len(key) > 1]
    inner = {character for key in long for character in key[1:]}
    inner |= {
        key
        for key, value in values.items()
        if len(key) == 1 and value and (value[0] in inner or category(value[0])[0] == "M")
    }
    continues = f"[{_spans(inner)}{_CONTINUES}]"
    pairs = f"[{_spans(key[0] for key in long)}][{_spans(key[1] for key in long)}]"
    key = rf"(?={pairs})(?:{_longest_key(rules)})" if long else "(?!)"
    return key, continues, _find_replacements(values)


def _longest_key(rules: CharsMap) -> str:
    """Return the trie's keys of several characters as a regular expression."""

    @cache
    def rest(node: int) -> str:
        """Match what may follow a node; characters with the same continuation share a class."""
        by_rest: dict[str, list[str]] = {}
        for character, child in rules.children(node).items():
            more = rest(child)
            if more:  # of keys of one character nothing is matched
                may_end = node != 0 and rules.value(child) is not None
                more = f"(?:{more})" + "?" * may_end
            if more or node != 0:
                by_rest.setdefault(more, []).append(character)
        return "|".join(f"[{_spans(c)}]{more}" for more, c in by_rest.items())

    return rest(0)


def _find_replacements(values: dict[str, str]) -> list[tuple[str, str]]:
    """Return the keys that composition leaves as they are, though they become something else."""
    by_character = {ord(key): value for key, value in values.items() if len(key) == 1}
    text = KEY_END.join(values).translate(by_character)
    composed = _COMPOSE.normalize_str(text).split(KEY_END)
    wrong = [key for key, c in zip(values, composed, strict=True) if values[key] != c]
    left = {key for key, c in zip(values, composed, strict=True) if key == c}
    if others := [key for key in wrong if key not in left]:
        logger.warning(
            "the exported tokenizer cannot follow %d of the vocabulary's %d normalization rules: "
            "text with %s, ... gets other ids than in training",
            *(len(others), len(values), ", ".join(map(ascii, others[:3]))),
        )
    # The longest first; in an order that is the same in every process.
    replaced = sorted(sorted(left.intersection(wrong)), key=len, reverse=True)
    return [(key, values[key]) for key in replaced]


def _spans(characters: Iterable[str]) -> str:
    """Return characters as the inside of a class of a regular expression."""
    spans = ""
    codes = sorted({ord(c) for c in characters})
    for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        same = [code for _, code in run]
        spans += rf"\x{{{same[0]:x}}}" + (rf"-\x{{{same[-1]:x}}}" if len(same) > 1 else "")
    return spans


def _utf8_length(first_byte: int) -> int:
    return 1 + (first_byte >= 0xC0) + (first_byte >= 0xE0) + (first_byte >= 0xF0)
