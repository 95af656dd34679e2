"""The grouped-expert decoder as a Transformers model: general (Moge*) and Pangu Pro MoE.

The experts stand beside the models, because Transformers finds support for experts implementations
by reading the source of the file that defines the model class. Attention, masks, caches, recorders
and parallel plans go through Transformers' interfaces; routing and the fast experts come from
`mogul.kernels`. The forward pass is that of Pangu Pro MoE (arXiv 2505.21411, section 2) with the
options of `MogeConfig`. Letters: T tokens, D hidden, E experts, M groups, K picks, B batch, L
positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import (
    can_return_tuple,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mogul.core.errors import BackendError
from mogul.kernels import side_by_side
from mogul.models.balance_loss import balance_loss, z_loss
from mogul.models.moge.attention import MogeAttention
from mogul.models.moge.configuration_moge import MogeConfig, PanguProMoEConfig
from mogul.models.moge.mtp import MtpHead, next_embeddings
from mogul.models.moge.norm import MogeRMSNorm
from mogul.models.moge.rotary import MogeRotaryEmbedding
from mogul.models.moge.router import MogeRouter

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # Transformers < 5.20 or so: positions from the end, or their indices

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Keep the last positions (0: all), or those whose indices are given."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


@dataclass
class MogeModelOutput(MoeModelOutputWithPast):
    """What the decoder returns; router records are tuples over the MoE layers, [T, ...] each."""

    mtp_hidden_state: Tensor | None = None
    router_weights: tuple[Tensor, ...] | None = None
    router_ids: tuple[Tensor, ...] | None = None


@dataclass
class MogeCausalLMOutput(MoeCausalLMOutputWithPast):
    """What the language model returns; router records as in `MogeModelOutput`."""

    mtp_loss: Tensor | None = None
    router_weights: tuple[Tensor, ...] | None = None
    router_ids: tuple[Tensor, ...] | None = None


# ---------------------------------------------------------------------------------- experts


@use_experts_implementation
class MogeExperts(nn.Module):
    """The routed experts of one layer, stacked: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""

    def __init__(self, config: MogeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )
        self.down_proj = nn.Parameter(
            torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim)
        )
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Implementation "eager": expert after expert; an id outside 0..E-1 has no row."""
        out_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, pick = torch.where(top_k_index == expert)
            if not len(token):
                continue
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y_RD = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            y_RD = y_RD * top_k_weights[token, pick, None]
            out_TD = out_TD.index_add(0, token, y_RD.to(out_TD.dtype))
        return out_TD


class MogeMLP(nn.Module):
    """A dense SwiGLU feed-forward: dense layers and the shared expert."""

    def __init__(self, config: MogeConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MogeSparseMoeBlock(nn.Module):
    """Router, routed experts and, when configured, a shared expert added with weight 1."""

    def __init__(self, config: MogeConfig) -> None:
        super().__init__()
        self.gate = MogeRouter(config)
        self.experts = MogeExperts(config)
        # Stock implementations skip rows without an expert only when this flag is set.
        experts: Any = self.experts
        experts._is_expert_parallel = config.num_null_experts > 0
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MogeMLP(config, shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = self.gate(x_TD)
        if (shared := self.shared_expert) is None:
            return self.experts(x_TD, ids_TK, weights_TK).reshape(hidden_states.shape)
        out, more = side_by_side(
            lambda: self.experts(x_TD, ids_TK, weights_TK), lambda: shared(x_TD), x_TD
        )
        return (out + more).reshape(hidden_states.shape)


# ------------------------------------------------------------------------------------ model


class MogeDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: MogeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MogeAttention(config, layer_idx)
        if layer_idx in (config.mlp_only_layers or ()):
            assert config.intermediate_size is not None  # checked by the configuration
            self.mlp = MogeMLP(config, config.intermediate_size)
        else:
            self.mlp = MogeSparseMoeBlock(config)
        self.input_layernorm = MogeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MogeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sandwich_norm = config.sandwich_norm
        if self.sandwich_norm:
            self.pre_mlp_layernorm = MogeRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_mlp_layernorm = MogeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        if not self.sandwich_norm:
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        out = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + self.post_mlp_layernorm(out)


class MogeMtpLayer(MogeDecoderLayer):
    """One layer after the last that predicts the token after next, see `mtp.py`."""

    def __init__(self, config: MogeConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.self_attn.layer_idx = 0  # it has a cache of its own
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = MogeRMSNorm(hidden, eps)
        self.hnorm = MogeRMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": MogeRMSNorm(hidden, eps)})

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, next_embeds: Tensor, **kwargs: Any
    ) -> Tensor:
        """Hidden states and the embeddings of the tokens that follow, [B, L, D] each."""
        joined = torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1)
        return self.shared_head["norm"](super().forward(self.eh_proj(joined), **kwargs))


class MogePreTrainedModel(PreTrainedModel):
    """What every model of the family tells Transformers about itself."""

    config: MogeConfig
    config_class = MogeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MogeDecoderLayer", "MogeMtpLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MogeRouter, index=0),
        "router_weights": OutputRecorder(MogeRouter, index=1),
        "router_ids": OutputRecorder(MogeRouter, index=2),
        "hidden_states": MogeDecoderLayer,
        "attentions": MogeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MogeExperts):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=std)
        elif isinstance(module, MogeAttention) and self.config.num_sink_keys:
            init.normal_(module.sink_key, mean=0.0, std=std)
            if self.config.use_sink_values:
                init.normal_(module.sink_value, mean=0.0, std=std)
        elif isinstance(module, MogeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.router_scale is not None:
                init.ones_(module.router_scale)
            module.reset_buffers()


class MogeModel(MogePreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MogeConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [MogeDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
            + [MogeMtpLayer(config) for _ in range(config.num_nextn_predict_layers)]
        )
        self.norm = MogeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MogeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        predict_next: bool = False,
        **kwargs: Any,
    ) -> MogeModelOutput:
        """Token ids [B, L] (or embeddings [B, L, D]) to the last hidden states [B, L, D].

        With `predict_next` the MTP layer runs too and gives `mtp_hidden_state` [B, L, D].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            position_ids = (positions + seen).unsqueeze(0)
        causal_mask = self._mask_function()(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        shared = {
            "attention_mask": causal_mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
            **kwargs,
        }
        cached = {"past_key_values": past_key_values, "use_cache": use_cache}
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, **cached, **shared)
        hidden_states, mtp_hidden_state = self.norm(hidden_states), None
        if predict_next:
            ahead = next_embeddings(embeds)
            mtp_hidden_state = self.layers[-1](hidden_states, ahead, **shared)
        return MogeModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            mtp_hidden_state=mtp_hidden_state,
        )

    def _mask_function(self) -> Callable[..., Any]:
        if self.config.sliding_window is not None:
            return create_sliding_window_causal_mask
        if self.config.num_sink_keys:  # a mask is needed to put the sinks before
            return partial(create_causal_mask, allow_is_causal_skip=False)
        return create_causal_mask


class MogeForCausalLM(MtpHead, MogePreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {  # noqa: RUF012  # pyright: ignore[reportAssignmentType]
        "lm_head": (["hidden_states"], ["logits"])
    }
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012
    base_model_class: type[MogeModel] = MogeModel

    def __init__(self, config: MogeConfig) -> None:
        super().__init__(config)
        self.model = self.base_model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MogeCausalLMOutput:
        """Token ids [B, L] to logits [B, L, V]; with `labels` [B, L] also the loss.

        The loss gains `router_aux_loss_coef` times the balance loss when `output_router_logits`
        is on, and `router_z_loss_coef` times the z-loss when that coefficient is positive. A model
        with an MTP layer adds `mtp_loss_coef` times its loss in training mode.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        wants_z_loss = labels is not None and self.config.router_z_loss_coef > 0
        if output_router_logits or wants_z_loss:
            kwargs["output_router_ids"] = True
        outputs: MogeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or wants_z_loss,
            predict_next=labels is not None and self.trains_mtp,
            **kwargs,
        )
        assert outputs.last_hidden_state is not None
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = mtp_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            if outputs.mtp_hidden_state is not None:
                mtp_loss = self.mtp_loss(outputs.mtp_hidden_state, labels, **kwargs)
                loss = loss + self.config.mtp_loss_coef * mtp_loss
        aux_loss = self._balance_loss(outputs, attention_mask) if output_router_logits else None
        if loss is not None:
            loss = self._with_router_losses(loss, outputs, aux_loss, attention_mask)
        return MogeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,  # pyright: ignore[reportArgumentType]
            mtp_loss=mtp_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_weights=outputs.router_weights,
            router_ids=outputs.router_ids,
        )

    def _with_router_losses(
        self,
        loss: Tensor,
        outputs: MogeModelOutput,
        aux_loss: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """The loss with the balance loss, where it is known, and with the z-loss."""
        if aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        if self.config.router_z_loss_coef > 0:
            z = z_loss(outputs.router_logits or (), attention_mask)
            loss = loss + self.config.router_z_loss_coef * z.to(loss.device)
        return loss

    def _balance_loss(self, outputs: MogeModelOutput, attention_mask: Tensor | None) -> Tensor:
        if (
            "ep_router" in (self.config.base_model_ep_plan or {}).values()
            and self._has_some_experts()
        ):
            raise BackendError(
                "under expert parallelism this version of Transformers shows each device its own "
                "picks only, so the balance loss cannot be computed",
                fix="upgrade Transformers, or set output_router_logits=False",
            )
        return balance_loss(
            outputs.router_logits or (),
            outputs.router_ids or (),
            num_experts=self.config.num_experts,
            score=self.config.router_score,
            attention_mask=attention_mask,
        )

    def _has_some_experts(self) -> bool:
        """Whether this process holds a part of each layer's experts only."""
        experts: list[Any] = [m for m in self.modules() if isinstance(m, MogeExperts)]
        return any(module.num_experts < self.config.num_experts for module in experts)


class MogeForSequenceClassification(GenericForSequenceClassification, MogePreTrainedModel):
    """The decoder with a head over the last position, as reward models need it."""


class MogeForTokenClassification(GenericForTokenClassification, MogePreTrainedModel):
    """The decoder with a head over every position."""


class PanguProMoEModel(MogeModel):
    """Pangu Pro MoE without a head."""

    config_class = PanguProMoEConfig


class PanguProMoEForCausalLM(MogeForCausalLM):
    """Pangu Pro MoE; reads and writes the released tensor names, see `models.conversion`."""

    config_class = PanguProMoEConfig
    base_model_class = PanguProMoEModel


__all__ = [
    "MogeForCausalLM",
    "MogeForSequenceClassification",
    "MogeForTokenClassification",
    "MogeModel",
    "MogePreTrainedModel",
    "PanguProMoEForCausalLM",
    "PanguProMoEModel",
]
