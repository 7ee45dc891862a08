"""The small trainings that engines and plain PyTorch both run."""

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_deberta.data import DebertaTokenizer, NGramMasker
from ds_deberta.kernels import AttentionFn, disentangled_attention
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD

STEPS = 4
BATCH = 16
LR = 2e-3
DISCRIMINATOR_LR = 1e-3
RTD_LAMBDA = 10.0
CLIP = 1.0


def allow_fp16_on_cpus() -> None:
    """Slow, so users are refused; but DeepSpeed does there what it does on a GPU."""
    type(get_accelerator()).is_fp16_supported = lambda _: True  # type: ignore[method-assign]


def build_models(
    objective: str,
    sharing: str,
    tokenizer: DebertaTokenizer,
    *,
    hidden_size: int = 32,
    attend: AttentionFn = disentangled_attention,
) -> dict[str, nn.Module]:
    """Freshly initialised models, the same in every process."""
    torch.manual_seed(3)
    config = DebertaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        position_buckets=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if objective == "mlm":
        return {"model": DebertaForMaskedLM(config, attend)}
    return {
        "generator": DebertaForMaskedLM(config, attend),
        "discriminator": DebertaForRTD(config, attend, embedding_sharing=sharing),  # type: ignore[arg-type]
    }


def masker(tokenizer: DebertaTokenizer) -> NGramMasker:
    """Every predicted token becomes [MASK]."""
    return NGramMasker(
        special=tokenizer.special,
        is_word_start=tokenizer.is_word_start,
        num_tokens=tokenizer.num_tokens,
        max_seq_length=32,
        mask_token_prob=1.0,
        keep_prob=0.0,
    )
