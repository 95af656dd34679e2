"""Checkpoints in fp8 beside the library whose format they are in, opened through Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mogul.kernels.quant_format import dequantise_fp8
from mogul.models.quantised_read import load_stored
from mogul.models.quantised_write import quantise_checkpoint

pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "head_dim": 16,
}
IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 9]])


def both(folder: Path, model: Any, format: str) -> tuple[Any, Any]:
    model.bfloat16().save_pretrained(folder / "source")
    out = quantise_checkpoint(folder / "source", folder / "out", format).folder
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ours = load_stored(out)
    with torch.no_grad():
        left, right = ours(IDS).logits.float(), theirs(IDS).logits.float()
    assert ((left - right).norm() / right.norm()) < 0.06  # they do not round inputs on a processor
    return ours, theirs


def test_they_read_our_linear_layers(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96))
    ours, theirs = both(tmp_path, model, "fp8")
    for layer in range(2):
        packed = ours.model.layers[layer].mlp.down_proj
        want = dequantise_fp8(packed.value, packed.scale, torch.float32)
        got = theirs.model.layers[layer].mlp.down_proj.weight.float()
        assert ((got - want).norm() / want.norm()) < 4e-3  # their scales are bf16


def test_they_read_our_experts(tmp_path: Path) -> None:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS))
    ours, theirs = both(tmp_path, model, "fp8-w8a16")
    for layer in range(2):
        record = ours.model.layers[layer].mlp.experts.experts
        want = record.gate_up.dequantise(record.format, torch.float32, slice(None))
        got = theirs.model.layers[layer].mlp.experts.gate_up_proj.float()
        assert ((got - want).norm() / want.norm()) < 4e-3
