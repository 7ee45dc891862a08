"""Make the lines that a vocabulary is trained on out of texts."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sources import cut_text

# Characters. sentencepiece adds up the probabilities along a word in single precision. Up to some
# 4,000 characters the rounding does not show in the vocabulary; with 40,000 it takes a seventh more
# tokens, with 100,000 twice as many or none at all.
LONGEST_RUN = 1000
# Its time grows with the square of a text that repeats within a line (dashes, "0 0 0 0"), also
# with spaces: a line of 100,000 characters takes it a minute.
LONGEST_LINE = 10_000
# What nmt_nfkc leaves together: it makes more characters than these into spaces, but rare ones.
RUN = re.compile(r"(?:[^\s\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd]|[\x0b\x1c-\x1f\x85])+")
SHOWN = 30  # characters of the first run


@dataclass
class CutRuns:
    """The runs of characters without a space that were cut, because they are too long."""

    count: int = 0
    longest: int = 0
    first: str = ""

    def cut(self, line: str) -> str:
        """Put spaces into runs that are too long."""
        if len(line) <= LONGEST_RUN or max(map(len, RUN.findall(line))) <= LONGEST_RUN:
            return line
        return RUN.sub(self._cut_run, line)

    def report(self) -> str:
        """Say what was cut; "" if nothing was."""
        if not self.count:
            return ""
        return (
            f"cut {self.count:,} {'run' if self.count == 1 else 'runs'} of more than "
            f"{LONGEST_RUN:,} characters without a space, the longest of {self.longest:,}: such a "
            f"run spoils a vocabulary. The first begins with {self.first}"
        )

    def _cut_run(self, match: re.Match[str]) -> str:
        run = match[0]
        if len(run) <= LONGEST_RUN:
            return run
        self.count += 1
        self.longest = max(self.longest, len(run))
        self.first = self.first or run[:SHOWN].encode(errors="backslashreplace").decode()
        return " ".join(
            run[start : start + LONGEST_RUN] for start in range(0, len(run), LONGEST_RUN)
        )


def cut_lines(texts: Iterable[str], runs: CutRuns) -> Iterator[str]:
    """Yield the lines that are not blank, long ones in pieces that end at a space."""
    for text in texts:
        for line in text.split("\n"):
            if line.strip():
                yield from cut_text(runs.cut(line), LONGEST_LINE)
