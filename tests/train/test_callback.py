"""The callback brings balance into Transformers' Trainer."""

from __future__ import annotations

import pytest
import torch

from mogul.train.balance_rules import BalanceSection
from mogul.train.callback import MogulCallback

pytest.importorskip("accelerate")


def _train(model, tmp_path, callbacks, accumulation=2):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_the_trainer_balances_and_tells(tiny_model, tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.config.output_router_logits = True
    callback = MogulCallback(BalanceSection(loss="global", bias="sign"))
    lines = _train(model, tmp_path, [callback])
    assert len(lines) == 4
    assert all(line["rho_2"] == 1.0 for line in lines)
    assert all(line["balance_loss"] >= 0.99 for line in lines)
    routers = [m for m in model.modules() if hasattr(m, "spec")]
    assert all(router.e_score_correction_bias.any() for router in routers)
    assert not [name for name, _ in model.named_buffers() if "balance" in name]
    assert model.config.output_router_logits is True


def test_its_loss_is_the_models_own(tiny_model, tmp_path):
    """Trained by the model's own batch loss and by the callback's: the same weights."""
    ours, own = (tiny_model(dtype=torch.float32) for _ in range(2))
    _train(ours, tmp_path / "a", [MogulCallback(BalanceSection(loss_coef=0.5))], accumulation=1)
    own.config.output_router_logits, own.config.router_aux_loss_coef = True, 0.5
    _train(own, tmp_path / "b", [], accumulation=1)
    for (name, a), b in zip(ours.named_parameters(), own.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-4, name
