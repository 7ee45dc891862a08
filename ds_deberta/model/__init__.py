"""DeBERTa-v2/v3 encoders, with heads for masked tokens and for replaced tokens."""

from ds_deberta.model.config import DebertaConfig
from ds_deberta.model.encoder import DebertaModel, EmbeddingSharing
from ds_deberta.model.heads import DebertaForMaskedLM, DebertaForRTD
from ds_deberta.model.presets import CONTINUED, MODELS, generator_config, load_model_config

__all__ = [
    "CONTINUED",
    "MODELS",
    "DebertaConfig",
    "DebertaForMaskedLM",
    "DebertaForRTD",
    "DebertaModel",
    "EmbeddingSharing",
    "generator_config",
    "load_model_config",
]
