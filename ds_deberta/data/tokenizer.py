"""Text to token ids and back: a sentencepiece vocabulary with DeBERTa's special tokens."""

import hashlib
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

FIRST_PIECES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
MASK_PIECE = "[MASK]"
WORD_START = "\u2581"  # sentencepiece's mark for "a space came before"
# How Unicode's names of their letters begin.
_WITHOUT_SPACES = (
    *("CJK ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "YI SYLLABLE"),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "JAVANESE ", "BALINESE ", "NEW TAI LUE"),
)
PUBLIC_NUM_TOKENS, PUBLIC_VOCAB_SIZE = 128_001, 128_100  # the released v2 and v3 checkpoints


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens."""

    pad: int
    cls: int
    sep: int
    unk: int
    mask: int

    def ids(self) -> tuple[int, ...]:
        """Return all of them."""
        return astuple(self)


class DebertaTokenizer:
    """A sentencepiece model whose first pieces are [PAD], [CLS], [SEP] and [UNK].

    [MASK] is the model's own piece of that name, else one more id after its last piece.

    Attributes:
        vocab_file: The sentencepiece model.
        sha256: Of that file.
        special: Ids of the special tokens.
        num_tokens: Live ids are 0 to num_tokens - 1.
        vocab_size: Rows of the embedding table: the live ids and padding.
    """

    def __init__(self, vocab_file: Path):
        self.vocab_file = Path(vocab_file)
        if not self.vocab_file.is_file():
            raise FileNotFoundError(
                f"there is no vocabulary {vocab_file}; give the path of a sentencepiece model, "
                "or make one with data_tools/train_tokenizer.py"
            )
        model = self.vocab_file.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = _load_processor(model, vocab_file)
        num_pieces = len(self._processor)
        mask = self._processor.piece_to_id(MASK_PIECE)
        if self._processor.id_to_piece(mask) != MASK_PIECE:  # unknown pieces have the id of [UNK]
            mask = num_pieces
        elif not self._processor.is_control(mask):
            raise ValueError(
                f"[MASK] must be a control piece, or text could spell it; in {vocab_file} it is "
                "an ordinary piece. Train it as a control symbol, or leave it out: it is appended."
            )
        self.special = SpecialTokens(pad=0, cls=1, sep=2, unk=3, mask=mask)
        self.num_tokens = max(num_pieces, mask + 1)
        self.vocab_size = _embedding_rows(self.num_tokens)

    @cached_property
    def is_word_start(self) -> np.ndarray:
        """Tell for every live id whether it starts a whole word, bool [num_tokens].

        As the original's `part_of_whole_word`: special tokens, pieces after a space, and single
        punctuation characters start one; every other piece continues the word before it. But for
        scripts that are written without spaces, where that word would be a sentence: there each
        piece is a word.
        """
        starts = np.array([_starts_word(piece) for piece in self.pieces(range(self.num_tokens))])
        starts[list(self.special.ids())] = True
        return starts

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens but for [UNK]."""
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts in one thread; who wants more speed starts more processes."""
        return self._processor.encode(texts, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with special tokens spelled out."""
        special = frozenset(self.special.ids())
        parts: list[str] = []
        for is_special, run in groupby(map(int, ids), special.__contains__):
            same = list(run)
            parts += self.pieces(same) if is_special else [self._processor.decode(same)]
        return " ".join(parts)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the pieces as the vocabulary spells them."""
        mask = self.special.mask
        return [MASK_PIECE if i == mask else self._processor.id_to_piece(int(i)) for i in ids]


def first_difference(
    ours: DebertaTokenizer, theirs: DebertaTokenizer
) -> tuple[int, str | None, str | None] | None:
    """Return the first id that is not the same piece in both, and its pieces; None: all are."""
    if ours.sha256 == theirs.sha256:
        return None
    pieces = (each.pieces(range(each.num_tokens)) for each in (ours, theirs))
    for i, (one, other) in enumerate(zip_longest(*pieces)):
        if one != other:
            return i, one, other
    return None


def _load_processor(model: bytes, vocab_file: Path) -> SentencePieceProcessor:
    if not model:
        raise ValueError(f"{vocab_file} is empty; it must be a sentencepiece model")
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError:  # its text names a line of C++ only
        raise ValueError(
            f"{vocab_file} is not a sentencepiece model; give the spm.model of a DeBERTa v2 or v3 "
            "checkpoint, or make one with data_tools/train_tokenizer.py"
        ) from None
    first = tuple(processor.id_to_piece(i) for i in range(min(len(FIRST_PIECES), len(processor))))
    *control, unknown = range(len(FIRST_PIECES))
    if first != FIRST_PIECES or not (
        all(processor.is_control(i) for i in control) and processor.is_unknown(unknown)
    ):
        raise ValueError(
            f"the first pieces must be {', '.join(FIRST_PIECES)} (control pieces and the unknown "
            f"piece); in {vocab_file} they are {', '.join(first)}. "
            "Make such a vocabulary with data_tools/train_tokenizer.py."
        )
    return processor


def _embedding_rows(num_tokens: int) -> int:
    """Pad the table as the public checkpoints do, any other to a multiple of 64 for speed."""
    return PUBLIC_VOCAB_SIZE if num_tokens == PUBLIC_NUM_TOKENS else -(-num_tokens // 64) * 64


def _starts_word(piece: str) -> bool:
    if piece.startswith(WORD_START):
        return True
    if unicodedata.name(piece[:1], "").startswith(_WITHOUT_SPACES):
        return True
    if len(piece) != 1:
        return False
    category = unicodedata.category(piece)
    return piece in string.punctuation or category == "Zs" or category[0] in "CP"
