"""TRL: SFTTrainer runs on an exported checkpoint, with the balance loss it switches on."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from mogul.models import load_model

pytest.importorskip("datasets", reason="datasets is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")


def test_sft_runs_five_steps(exported, tmp_path):
    from datasets import Dataset

    texts = [f"question {i}: which expert? answer: number {i % 8}." for i in range(20)]
    model = load_model(exported, dtype="float32").train()
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, max_length=64,
        bf16=False,
        gradient_checkpointing=False, lr_scheduler_type="constant",

    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=AutoTokenizer.from_pretrained(exported),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert not torch.equal(model.model.layers[0].mlp.experts.down_proj, before)
