"""The two models that are pre-trained: masked language model (generator) and discriminator.

Shapes: B batch, L length, P predicted positions, E hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_deberta.kernels import (
    AttentionFn,
    HeadOutput,
    TableGradient,
    disentangled_attention,
    linear_cross_entropy,
    tied_lookup,
)
from ds_deberta.model.config import ACTIVATIONS, DebertaConfig
from ds_deberta.model.documents import first_states
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
        self.table_gradient: TableGradient | None = None

    def defer_table_gradient(self) -> None:
        """Have the word table's gradient gathered in parts, in its `table_gradient`.

        What has too many parts goes to its `grad`, as ever. `optim.AdamW` looks at both.
        """
        table: Any = self.deberta.embeddings.word_embeddings.weight
        table.table_gradient = self.table_gradient = TableGradient(table)

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L]
        predicted_positions: Tensor,  # [B, P]
        labels: Tensor,  # [B, P]
        uniforms: Tensor | None = None,  # [B, P]
        *,
        num_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> HeadOutput:
        """Predict the tokens at `predicted_positions`, and draw tokens for them.

        Args:
            input_ids: Token ids.
            attention_mask: True where a real token is, or the number of its document.
            predicted_positions: What to predict.
            labels: The tokens that are right; negative where there is nothing to predict.
            uniforms: In [0, 1), one for each token to draw; None: draw nothing.
            num_tokens: Only ids below it are predicted and drawn; None: all.
            temperature: Of the tokens that are drawn.

        Returns:
            The loss, 0-d, summed over the labels; predictions and samples, [B, P] each.
        """
        words: Any = self.deberta.embeddings.word_embeddings
        rows, table = tied_lookup(words.weight, input_ids, words.padding_idx, self.table_gradient)
        states = self.deberta(
            input_ids, attention_mask, word_rows=rows, predicted_positions=predicted_positions
        )  # [B, P, E]
        return self.lm_predictions["lm_head"](
            states,
            table,
            labels,
            uniforms,
            num_tokens=num_tokens,
            temperature=temperature,
            table_gradient=self.table_gradient,
        )

    def logits(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L]
        predicted_positions: Tensor,  # [B, P]
    ) -> Tensor:  # [B, P, V]
        """Return the logits of the tokens at `predicted_positions`; training never makes them."""
        states = self.deberta(
            input_ids, attention_mask, predicted_positions=predicted_positions
        )  # [B, P, E]
        head = self.lm_predictions["lm_head"]
        weight = self.deberta.embeddings.word_embeddings.weight
        assert isinstance(head, LMHead)
        assert isinstance(weight, Tensor)
        return F.linear(head.transform(states), weight, head.bias)


class LMHead(nn.Module):
    """Transform, then the product with the word embeddings, which the head shares."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(
        self,
        states: Tensor,  # [B, P, E]
        word_embeddings: Tensor,  # [V, E]
        labels: Tensor,  # [B, P]
        uniforms: Tensor | None,  # [B, P]
        *,
        num_tokens: int | None,
        temperature: float,
        table_gradient: TableGradient | None,
    ) -> HeadOutput:
        """Return the loss, 0-d; predictions and samples, [B, P] each."""
        output = linear_cross_entropy(
            self.transform(states).flatten(0, 1),
            word_embeddings,
            self.bias,
            labels.flatten(),
            None if uniforms is None else uniforms.flatten(),
            num_tokens=num_tokens,
            temperature=temperature,
            table_gradient=table_gradient,
        )
        samples = None if output.samples is None else output.samples.view_as(labels)
        return HeadOutput(output.loss, output.predictions.view_as(labels), samples)

    def transform(self, states: Tensor) -> Tensor:
        """Map [B, P, E] to what the product with the vocabulary reads."""
        return self.LayerNorm(self.activation(self.dense(states)))


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
        hidden = self.deberta(input_ids, attention_mask, base_embeddings)
        return self.mask_predictions(hidden, attention_mask)


class RTDHead(nn.Module):
    """Classify each position together with the state of its document's [CLS]."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Map [B, L, E] to logits [B, L]."""
        states = self.LayerNorm(first_states(hidden, attention_mask) + hidden)
        return self.classifier(self.activation(self.dense(states))).squeeze(-1)
