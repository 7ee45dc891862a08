"""The way from prepared token ids to masked batches: shards, sampler, masking, loader."""

from ds_deberta.data.loader import (
    IGNORE_INDEX,
    Batch,
    MaskingCollator,
    build_train_batches,
    build_valid_batches,
)
from ds_deberta.data.masking import NGramMasker
from ds_deberta.data.sampler import ResumableSampler, permute
from ds_deberta.data.shards import (
    FORMAT_VERSION,
    Manifest,
    ShardDataset,
    ShardInfo,
    ShardWriter,
    SplitInfo,
    TokenizerInfo,
    load_tokenizer,
)
from ds_deberta.data.tokenizer import DebertaTokenizer, SpecialTokens

__all__ = [
    "FORMAT_VERSION",
    "IGNORE_INDEX",
    "Batch",
    "DebertaTokenizer",
    "Manifest",
    "MaskingCollator",
    "NGramMasker",
    "ResumableSampler",
    "ShardDataset",
    "ShardInfo",
    "ShardWriter",
    "SpecialTokens",
    "SplitInfo",
    "TokenizerInfo",
    "build_train_batches",
    "build_valid_batches",
    "load_tokenizer",
    "permute",
]
