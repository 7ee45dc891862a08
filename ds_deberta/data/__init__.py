"""The way from prepared token ids to masked batches: shards, sampler, masking, loader.

Here is what needs no torch, for the data tools; batches of tensors come from `data.loader`.
"""

from ds_deberta.data.added_words import check_added_words
from ds_deberta.data.masking import NGramMasker
from ds_deberta.data.sampler import ResumableSampler, permute
from ds_deberta.data.shards import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    ShardDataset,
    ShardInfo,
    ShardWriter,
    SplitInfo,
    TokenizerInfo,
    find_damage,
    load_tokenizer,
)
from ds_deberta.data.tokenizer import DebertaTokenizer, SpecialTokens

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "DebertaTokenizer",
    "Manifest",
    "NGramMasker",
    "ResumableSampler",
    "ShardDataset",
    "ShardInfo",
    "ShardWriter",
    "SpecialTokens",
    "SplitInfo",
    "TokenizerInfo",
    "check_added_words",
    "find_damage",
    "load_tokenizer",
    "permute",
]
