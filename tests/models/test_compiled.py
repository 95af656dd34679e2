"""A whole model with experts_implementation="mogul" is one graph, its experts one operator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import mogul.models  # noqa: F401 (registers the implementation)

pytest.importorskip("triton")


def test_a_model_compiles_to_one_graph_with_our_operator() -> None:
    script = Path(__file__).with_name("run_compiled.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"Qwen3Moe": [1, 1, True], "Moge": [1, 1, True]}


def test_a_model_is_exported_for_any_length(exported: Any) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24,
        pad_token_id=0, experts_implementation="mogul",
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    ids = torch.randint(1, 64, (2, 20))
    program = exported(model, ids[:, :9], 64)
    with torch.no_grad():
        assert program.graph_module.code.count("torch.ops.mogul.") == 2, "an operator a layer"
        given = program.module()(ids, use_cache=False).logits
        torch.testing.assert_close(given, model(ids, use_cache=False).logits, rtol=0, atol=1e-6)
