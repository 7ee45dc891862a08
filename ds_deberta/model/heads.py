"""The two models that are pre-trained: masked language model (generator) and discriminator.

Shapes: B batch, L length, P predicted positions, E hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_deberta.kernels import AttentionFn, disentangled_attention
from ds_deberta.model.config import ACTIVATIONS, DebertaConfig
from ds_deberta.model.encoder import DebertaModel, EmbeddingSharing, initialize


class DebertaForMaskedLM(nn.Module):
    """Predict masked tokens: the generator, and the MLM model.

    The last layer is the enhanced mask decoder, unless the input is position-biased. The layer and
    the head run for the predicted positions alone.
    """

    def __init__(self, config: DebertaConfig, attend: AttentionFn = disentangled_attention):
        super().__init__()
        if config.num_hidden_layers < 2:
            raise ValueError(
                "num_hidden_layers must be at least 2 for a masked language model, whose decoder "
                f"reads the layer before the last; got {config.num_hidden_layers}. Add a layer."
            )
        self.deberta = DebertaModel(config, attend, has_position_table=True)
        self.lm_predictions = nn.ModuleDict({"lm_head": LMHead(config)})
        initialize(self.lm_predictions, config)

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L]
        predicted_positions: Tensor,  # [B, P]
    ) -> Tensor:  # [B, P, V]
        """Return the logits of the tokens at `predicted_positions`."""
        states = self.deberta(
            input_ids, attention_mask, predicted_positions=predicted_positions
        )  # [B, P, E]
        return self.lm_predictions["lm_head"](
            states, self.deberta.embeddings.word_embeddings.weight
        )


class LMHead(nn.Module):
    """Transform, then the product with the word embeddings, which the head shares."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """Map [B, P, E] and [V, E] to logits [B, P, V]."""
        states = self.LayerNorm(self.activation(self.dense(states)))
        return F.linear(states, word_embeddings, self.bias)


class DebertaForRTD(nn.Module):
    """Tell replaced tokens from original ones: the discriminator."""

    def __init__(
        self,
        config: DebertaConfig,
        attend: AttentionFn = disentangled_attention,
        *,
        embedding_sharing: EmbeddingSharing = "nes",
    ):
        super().__init__()
        self.deberta = DebertaModel(config, attend, embedding_sharing=embedding_sharing)
        self.mask_predictions = RTDHead(config)
        initialize(self.mask_predictions, config)

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L]
        base_embeddings: Tensor | None = None,  # [B, L, E]
    ) -> Tensor:  # [B, L]
        """Return the logits of "replaced"; see `DebertaModel.forward` for `base_embeddings`."""
        return self.mask_predictions(self.deberta(input_ids, attention_mask, base_embeddings))


class RTDHead(nn.Module):
    """Classify each position together with the [CLS] state."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, L, E] to logits [B, L]."""
        states = self.LayerNorm(hidden[:, :1] + hidden)
        return self.classifier(self.activation(self.dense(states))).squeeze(-1)
