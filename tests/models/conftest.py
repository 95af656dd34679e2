"""A tiny Pangu Pro MoE checkpoint in the released layout, and its forward written plainly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

TINY_PANGU = {
    "architectures": ["PanguProMoEForCausalLM"],
    "model_type": "PanguProMoE",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 16000000.0,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_experts_per_tok": 4,
    "num_experts": 16,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def released_tensors(scale_shape: str = "[1, E]", dtype=torch.float32) -> dict[str, Tensor]:
    """Random tensors under the released names."""
    c = TINY_PANGU
    d, e = c["hidden_size"], c["num_experts"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (96, d),
        "lm_head.weight": (96, d),
        "model.norm.weight": (d,),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[layer + norm + ".weight"] = (d,)
        for name, width in {"q": d, "k": kv, "v": kv, "o": d}.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (width, d)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (width,)
        shapes[layer + "mlp.gate.weight"] = (e, d)
        shapes[layer + "mlp.router_scale"] = (1, e) if scale_shape == "[1, E]" else (e,)
        experts = {f"experts.{j}": c["moe_intermediate_size"] for j in range(e)}
        for name, width in {
            **experts,
            "shared_expert": c["shared_expert_intermediate_size"],
        }.items():
            shapes[f"{layer}mlp.{name}.gate_proj.weight"] = (width, d)
            shapes[f"{layer}mlp.{name}.up_proj.weight"] = (width, d)
            shapes[f"{layer}mlp.{name}.down_proj.weight"] = (d, width)
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm" in name or "router_scale" in name:
            return 1 + 0.2 * values
        return values * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)

    return {name: draw(name, shape).to(dtype) for name, shape in shapes.items()}


def write_sharded(folder: Path, tensors: dict[str, Tensor], config: dict, shards: int = 3) -> Path:
    """Write tensors over several files with an index, and the config."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pangu_folder(tmp_path) -> Callable[..., Path]:
    """Write a tiny released checkpoint; keywords change tensors, scale shape and config."""

    def write(
        *,
        scale_shape: str = "[1, E]",
        dtype=torch.float32,
        extra: dict[str, Tensor] | None = None,
        change: Callable[[dict[str, Tensor]], object] = lambda _: None,
        **config: object,
    ) -> Path:
        tensors = released_tensors(scale_shape, dtype) | (extra or {})
        change(tensors)
        words = {"torch_dtype": str(dtype).removeprefix("torch.")}
        return write_sharded(tmp_path / "pangu", tensors, TINY_PANGU | words | config)

    return write


@pytest.fixture
def reference_logits() -> Callable[..., Tensor]:
    return pangu_reference


def pangu_reference(w: dict[str, Tensor], tokens: Tensor, config: dict) -> Tensor:
    """Pangu Pro MoE written from its description: one sequence [L] to logits [L, V]."""
    heads, kv, eps = (
        config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"],
    )  # fmt: skip
    groups, length = config["num_experts_per_tok"], len(tokens)
    width = config["hidden_size"] // heads

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def swiglu(x, name):
        gate = linear(x, name + ".gate_proj")
        return linear(gate * gate.sigmoid() * linear(x, name + ".up_proj"), name + ".down_proj")

    def rope(x):  # [heads, L, width]
        power = torch.arange(width // 2) * 2 / width
        angle = torch.arange(length)[:, None] / config["rope_theta"] ** power
        a, b = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attention(x, name):
        q, k, v = (
            linear(x, f"{name}.{p}_proj").view(length, -1, width).transpose(0, 1) for p in "qkv"
        )
        k, v = (t.repeat_interleave(heads // kv, 0) for t in (rope(k), v))
        scores = rope(q) @ k.transpose(1, 2) / width**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        chances = scores.masked_fill(future, -torch.inf).softmax(-1)
        return linear((chances @ v).transpose(0, 1).reshape(length, -1), name + ".o_proj")

    def moe(x, name):
        out = swiglu(x, name + ".shared_expert")
        scores = linear(x, name + ".gate").softmax(-1)
        scale = w[name + ".router_scale"].flatten()
        size = config["num_experts"] // groups
        for t in range(length):
            for g in range(groups):
                expert = g * size + int(scores[t, g * size : (g + 1) * size].argmax())
                y = swiglu(x[t], f"{name}.experts.{expert}")
                out[t] = out[t] + scores[t, expert] * scale[expert] * y
        return out

    h = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = h + attention(norm(h, layer + ".input_layernorm"), layer + ".self_attn")
        h = h + moe(norm(h, layer + ".post_attention_layernorm"), layer + ".mlp")
    return linear(norm(h, "model.norm"), "lm_head")


@pytest.fixture
def exported() -> Callable[[Any, Tensor, int], torch.export.ExportedProgram]:
    """A causal language model as a program for ids [B, T] of any T from 2 to a bound.

    Ids in one piece: a view's row stride would be a length that the program excludes. Checks are
    made by the program where torch 2.11 can't prove them beforehand: min(32 T, 64 T) = 32 T, for
    the strides of keys that Transformers repeats for heads of queries.
    """

    def export(model: Any, ids: Tensor, most: int) -> torch.export.ExportedProgram:
        length = torch.export.Dim("length", min=2, max=most)
        with torch.no_grad():
            return torch.export.export(
                model, (ids.contiguous(),), {"use_cache": False}, strict=False,
                dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
                prefer_deferred_runtime_asserts_over_guards=True,
            )  # fmt: skip

    return export
