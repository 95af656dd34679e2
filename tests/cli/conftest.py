"""A tiny random mixture-of-experts checkpoint with a tokenizer trained here."""

from pathlib import Path

import pytest

TEXT = [
    "the router sends every token to one expert in every group",
    "a group of experts stands on one device and no device waits",
    "experts and tokens and groups and devices: what is a token?",
] * 20

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def write_tokenizer(folder: Path, *, template: str | None) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)


def write_checkpoint(folder: Path, *, template: str | None = TEMPLATE, **changes: object) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "max_position_embeddings": 65536,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.5,
            **changes,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder, template=template)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def endless_checkpoint(tmp_path_factory) -> Path:
    """A model that no sampled token ends."""
    return write_checkpoint(tmp_path_factory.mktemp("endless"), eos_token_id=999)


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory) -> Path:
    """A model without a chat template and with a short context."""
    folder = tmp_path_factory.mktemp("base")
    return write_checkpoint(folder, template=None, max_position_embeddings=64)


@pytest.fixture(scope="session")
def sink_checkpoint(tmp_path_factory) -> Path:
    """A model whose sink keys no pages can hold."""
    import torch
    from transformers import AutoModelForCausalLM

    from mogul.models import MogeConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sinks")
    config = MogeConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        router_n_groups=2,
        moe_intermediate_size=16,
        num_sink_keys=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder, template=None)
    return folder
