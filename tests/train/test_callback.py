"""The callback brings balance into Transformers' Trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from mogul.train.balance_rules import BalanceSection
from mogul.train.callback import MogulCallback
from mogul.train.routers import TrainedRouter

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


class _Interrupt(TrainerCallback):
    """Ctrl-C in the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("again", ["the same", "a new one"])
def test_an_interrupted_training_can_begin_again(tiny_model, tmp_path, again):
    model = tiny_model(dtype=torch.float32)
    first = MogulCallback(BalanceSection(bias="sign"))
    with pytest.raises(KeyboardInterrupt):
        _train(model, tmp_path, [first, _Interrupt()])
    second = first if again == "the same" else MogulCallback(BalanceSection(bias="sign"))
    lines = _train(model, tmp_path, [second])
    assert len(lines) == 4
    assert all(line["balance_loss"] >= 0.99 for line in lines)
    assert not [name for name, _ in model.named_buffers() if "balance" in name]
    assert not [m for m in model.modules() if isinstance(m, TrainedRouter)]


def test_a_resumed_training_knows_its_step(tiny_model):
    """The end of the bias and the decay of its steps count from the first step of all."""
    model = tiny_model(dtype=torch.float32)
    callback = MogulCallback(BalanceSection(bias="decay", bias_until=0.5))
    arguments = SimpleNamespace(gradient_accumulation_steps=1, world_size=1)
    for reached, updates in ((0, 1), (30, 31), (60, 50)):
        state = SimpleNamespace(max_steps=100, global_step=reached)
        callback.on_train_begin(arguments, state, None, model=model)
        ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
        before = [r.e_score_correction_bias.clone() for r in callback.balancer.routers]
        model(input_ids=ids)
        callback.on_step_end(arguments, state, None)
        after = [r.e_score_correction_bias for r in callback.balancer.routers]
        moved = any((a != b).any() for a, b in zip(before, after, strict=True))
        assert moved == (reached < 50)
        assert callback.balancer.updates == updates
        callback.on_train_end(arguments, state, None, model=model)
