"""A small MoGE on disk with a byte-level tokenizer, for other libraries to read and train."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mogul.models import MogeConfig, MogeForCausalLM

SMALL = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 4,
    "router_n_groups": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 512, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip


def byte_tokenizer():
    """One token a byte, and the end of text."""
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", bos_token="<|end|>"
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The folder of an exported checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    MogeForCausalLM(MogeConfig(**SMALL)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
