"""Multi-token prediction: one layer after the last predicts the token after next.

As in DeepSeek-V3 (arXiv 2412.19437, section 2.2), depth 1: position t joins the model's last
hidden state (after its final norm) with the embedding of token t + 1, both normed, projects them
to the hidden size, passes one decoder layer and gives logits for token t + 2 through the model's
own head. The layer stands in `model.layers` under the number `num_hidden_layers`, so its tensors
have the field's names: `model.layers.{L}.enorm`, `.hnorm`, `.eh_proj`, `.shared_head.norm` and
those of a layer. Embedding and head are shared and not stored twice.

In training the layer sees whole windows: its last position is fed the first token and has no
label, so that shapes stay those of the model. Plain generation never runs it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mogul.core.errors import ConfigError
from mogul.models.moge.configuration_moge import MogeConfig

IGNORED = -100


def next_embeddings(embeds: Tensor) -> Tensor:
    """The embedding of the following token at every position [B, L, D]; the last gets the first."""
    return embeds.roll(-1, dims=1)


def next_labels(labels: Tensor) -> Tensor:
    """Labels [B, L] for a loss that shifts by one, so that it scores the token after next."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class MtpHead:
    """What a causal language model with an MTP layer can do besides."""

    config: MogeConfig
    model: Any
    lm_head: nn.Module
    vocab_size: int
    training: bool

    @property
    def has_mtp(self) -> bool:
        """Whether the model has the layer."""
        return self.config.num_nextn_predict_layers > 0

    @property
    def trains_mtp(self) -> bool:
        """Whether a forward with labels trains the layer."""
        return self.has_mtp and self.training and self.config.mtp_loss_coef > 0

    def mtp_loss(self, mtp_hidden_state: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """Loss of the layer's output [B, L, D] against the same labels [B, L] as the model's."""
        logits, model = self.lm_head(mtp_hidden_state), cast("Any", self)
        return model.loss_function(logits, next_labels(labels), self.vocab_size, **kwargs)

    def mtp(
        self,
        hidden_states: Tensor,
        next_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Logits [B, L, V] of the token after next.

        Args:
            hidden_states: the decoder's `last_hidden_state` at positions t, [B, L, D].
            next_ids: the tokens at positions t + 1, [B, L]: known, or just sampled.
            attention_mask: [B, cached + L], 0 at padding.
            position_ids: the positions t; by default they follow what the cache holds.
            past_key_values: a cache for this layer alone (`DynamicCache()`), never the model's.

        Raises:
            ConfigError: the model has no such layer.
        """
        hidden = self.mtp_hidden(
            hidden_states,
            next_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        return self.lm_head(hidden)

    def mtp_hidden(
        self,
        hidden_states: Tensor,
        next_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """What `mtp` gives to the head, [B, L, D]: also the input for one token further."""
        if not self.has_mtp:
            raise ConfigError(
                "this model has no multi-token-prediction layer",
                fix="use a checkpoint with num_nextn_predict_layers = 1",
            )
        layer = self.model.layers[self.config.num_hidden_layers]
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            steps = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            position_ids = (steps + seen).unsqueeze(0)
        return layer(
            hidden_states,
            self.model.embed_tokens(next_ids),
            attention_mask=self.model._mask_function()(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            position_ids=position_ids,
            position_embeddings=self.model.rotary_emb(hidden_states, position_ids=position_ids),
            past_key_values=past_key_values,
        )
