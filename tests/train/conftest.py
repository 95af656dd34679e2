"""Tiny models and token folders for the training tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mogul.models import MogeConfig, MogeForCausalLM


def tiny_config(**changes) -> MogeConfig:
    return MogeConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "router_n_groups": 2,
            "moe_intermediate_size": 16,
            "max_position_embeddings": 128,
            "router_selection_bias": True,
            **changes,
        }
    )


@pytest.fixture
def tiny_model():
    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> MogeForCausalLM:
        torch.manual_seed(seed)
        model = MogeForCausalLM(tiny_config(**changes)).to(torch.float64)
        model.set_experts_implementation("mogul")
        for parameter in model.parameters():  # far from ties and from zero
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.to(dtype).train()

    return make


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory) -> Path:
    """Token shards of a text that can be learnt: short sentences over a few letters."""
    from mogul.train.data.build import BuildSpec, build

    rng = np.random.default_rng(0)
    words = ["ab", "cad", "bead", "face", "deaf", "decade"]
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        text = "\n".join(" ".join(rng.choice(words, size=8)) for _ in range(60))
        (folder / f"{i}.txt").write_text(text + ".\n")
    out = tmp_path_factory.mktemp("tokens") / "shards"
    build(
        BuildSpec(sources=(str(folder),), vocab_size=300, held_out=0.1, held_out_by="position"),
        out,
    )
    return out


@pytest.fixture
def recipe(token_folder):
    """A recipe of six steps of the tiny model; keyword `section__key` changes a value."""
    from mogul.train.recipe import Recipe
    from mogul.train.recipe_file import merged

    values = {
        "model": {
            "config": {
                "vocab_size": 300,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "router_n_groups": 2,
                "moe_intermediate_size": 16,
                "max_position_embeddings": 64,
            }
        },
        "data": {"sources": [str(token_folder)]},
        "run": {"steps": 6, "batch_size": 2, "sequence_length": 32, "device": "cpu"},
        "optimizer": {"lr": 0.01, "kind": "muon"},
        "balance": {"loss": "global", "bias": "sign"},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1, "report": False, "eval_batches": 1},
    }

    def make(**changes) -> Recipe:
        laid = values
        for path, value in changes.items():
            section, key = path.split("__", 1)
            laid = merged(laid, {section: {key: value}})
        return Recipe.parse(laid)

    return make
