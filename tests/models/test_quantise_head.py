"""An output head in 8 bits: its numbers, its place in a model, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mogul.core.errors import ConfigError
from mogul.kernels.triton.byte_linear import linear_bytes, pack_bytes, unpack_bytes
from mogul.models.quantise_head import PackedHead, quantise_head


def test_whole_numbers_come_back_exactly():
    numbers = torch.randint(-127, 128, (37, 26))
    numbers[:, 3] = 127  # so that a scale is what it says
    scale = torch.rand(37) + 0.5
    words, found = pack_bytes(numbers * scale[:, None])
    assert words.shape == (37, 13)
    assert torch.allclose(found, scale)
    assert torch.equal(unpack_bytes(words, torch.ones(37), torch.float32), numbers.float())


def test_rounding_is_half_a_step_at_most():
    weight = torch.randn(50, 64)
    words, scale = pack_bytes(weight)
    off = (unpack_bytes(words, scale, torch.float32) - weight).abs()
    assert bool((off <= scale[:, None] * 0.5001).all())
    assert float(off.max()) > float(scale.max()) * 0.4


def test_the_product_is_that_of_the_numbers_in_blocks_of_columns(monkeypatch):
    from mogul.kernels.triton import byte_linear

    monkeypatch.setattr(byte_linear, "_BLOCK_COLUMNS", 16)
    words, scale = pack_bytes(torch.randn(50, 64))
    x = torch.randn(3, 64)
    want = x @ unpack_bytes(words, scale, torch.float32).T
    assert torch.allclose(linear_bytes(x, words, scale), want, atol=1e-4)


def test_rows_of_odd_length_are_refused():
    with pytest.raises(ConfigError, match="a row of 5 numbers has no halves"):
        pack_bytes(torch.randn(4, 5))


def test_a_model_gets_a_head_that_a_cast_leaves_alone():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 16,
    }
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        want = model(ids).logits
        packed = quantise_head(model)
        assert model.get_output_embeddings() is packed
        got = model(ids).logits
    assert 0 < float((got - want).abs().max()) < 0.02 * float(want.abs().max())
    assert "8 bits, 32 -> 90" in repr(packed)
    packed.to(torch.float64)
    assert packed.words.dtype == torch.int16
    assert packed.scale.dtype == torch.float32
    with pytest.raises(ConfigError, match="the output head is PackedHead, not a linear"):
        quantise_head(model)


def test_a_bias_is_added():
    linear = nn.Linear(8, 6)
    packed = PackedHead(*pack_bytes(linear.weight.detach()), linear.bias.detach())
    x = torch.randn(2, 3, 8)
    assert torch.allclose(packed(x), linear(x), atol=0.02)
