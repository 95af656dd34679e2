"""The loop learns, repeats itself, stops when told, and names what went wrong."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mogul.core.errors import ConfigError, MogulError
from mogul.train.data import Windows, batches
from mogul.train.evaluate import held_out_loss
from mogul.train.loop import train
from mogul.train.optimizer import TrainSettings, build_optimizer, holds_parameters_of
from mogul.train.step import Stepper

VOCAB = 17


class TinyLM(nn.Module):
    """The next token from this one; the shape of a causal language model of Transformers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, VOCAB)

    def forward(self, input_ids, labels=None, use_cache=False):
        logits = self.head(self.norm(self.embed(input_ids)))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def _windows() -> Windows:
    """Every token is followed by three times itself, modulo the vocabulary."""
    starts = np.arange(64)[:, None] % (VOCAB - 1) + 1
    ids = starts * 3 ** np.arange(8) % VOCAB
    return Windows(ids, np.full_like(ids, 2))


def _train(model, **changes):
    settings = TrainSettings(**{"lr": 0.02, "max_steps": 60, **changes})
    return train(model, batches(_windows(), batch_size=8, seed=3), settings)


def test_loss_falls_and_is_the_same_twice():
    first, second = TinyLM(), TinyLM()
    before = held_out_loss(first, _windows())
    record = _train(first)
    after = held_out_loss(first, _windows())
    assert before.nats_per_token > 2.5
    assert after.nats_per_token < 0.5 * before.nats_per_token
    assert record.losses == _train(second).losses
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_record_counts_steps_and_tokens():
    model = TinyLM()
    record = _train(model, max_steps=5)
    assert (record.steps, record.tokens) == (5, 5 * 8 * 8)
    assert len(record.losses) == len(record.grad_norms) == 5
    assert record.tokens_per_s == pytest.approx(record.tokens / record.seconds)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_a_step_do_not_outlive_it(monkeypatch):
    kept: list[weakref.ref] = []
    alive: list[int] = []
    plain = Stepper.gradients

    def watched(self, micro_batches):
        alive.append(sum(one() is not None for one in kept))
        found = plain(self, micro_batches)
        kept.extend(weakref.ref(tensor) for tensor in found.tensors if tensor is not None)
        return found

    monkeypatch.setattr(Stepper, "gradients", watched)
    _train(TinyLM(), max_steps=3)
    assert kept
    assert alive == [0, 0, 0]


def test_seconds_stop_it():
    assert _train(TinyLM(), max_steps=None, max_seconds=0.05).seconds < 5
    assert _train(TinyLM(), max_steps=3, max_seconds=600).steps == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_the_step(bad):
    model = TinyLM()
    calls = []

    def spoil(_module, _args, output):
        calls.append(1)
        if len(calls) == 3:
            output.loss = output.loss * bad
        return output

    model.register_forward_hook(spoil)
    with pytest.raises(MogulError, match=r"the loss is (nan|inf) at step 2") as caught:
        _train(model)
    assert "lower the learning rate" in caught.value.__notes__[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_batches_that_end_are_an_error():
    with pytest.raises(MogulError, match="the batches ran out at step 0"):
        train(TinyLM(), iter(()), TrainSettings(max_steps=1))


def test_a_larger_mesh_is_refused():
    with pytest.raises(ConfigError, match="a mesh of 2 devices is not built"):
        train(TinyLM(), iter(()), TrainSettings(max_steps=1), mesh=SimpleNamespace(size=lambda: 2))


def test_vectors_and_embeddings_do_not_decay():
    model = TinyLM()
    decays, stays = build_optimizer(model, TrainSettings(max_steps=1)).param_groups
    assert [id(p) for p in decays["params"]] == [id(model.head.weight)]
    assert decays["weight_decay"] == 0.1
    assert stays["weight_decay"] == 0
    assert len(stays["params"]) == 4


def test_frozen_parameters_are_left_alone():
    model = TinyLM()
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.clone()
    _train(model, max_steps=3)
    assert torch.equal(before, model.embed.weight)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the model asks for a gradient"):
        _train(model)


def test_a_swapped_parameter_is_noticed():
    model = TinyLM()
    optimizer = build_optimizer(model, TrainSettings(max_steps=1))
    assert holds_parameters_of(optimizer, model)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert not holds_parameters_of(optimizer, model)


def test_schedule():
    constant = TrainSettings(lr=1.0, warmup_steps=4, max_seconds=1)
    assert [constant.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = TrainSettings(
        lr=1.0, warmup_steps=2, max_steps=12, schedule="cosine", final_lr_ratio=0.2
    )
    assert cosine.lr_at(2) == 1.0
    assert cosine.lr_at(7) == pytest.approx(0.6)
    assert cosine.lr_at(12) == pytest.approx(0.2)


def test_settings_refuse_what_cannot_end():
    with pytest.raises(ConfigError, match="never ends"):
        TrainSettings()
    with pytest.raises(ConfigError, match="cosine schedule needs max_steps"):
        TrainSettings(schedule="cosine", max_seconds=3)


def test_held_out_loss_is_the_mean_of_the_formula():
    model, windows = TinyLM().train(), _windows()
    got = held_out_loss(model, windows, batch_size=5)
    logits = model(torch.from_numpy(windows.ids)).logits[:, :-1].flatten(0, 1)
    want = functional.cross_entropy(logits, torch.from_numpy(windows.ids[:, 1:]).flatten())
    assert got.nats_per_token == pytest.approx(want.item(), rel=1e-5)
    # Every token stands for two bytes here.
    assert got.bits_per_byte == pytest.approx(got.nats_per_token / math.log(2) / 2)
    assert got.tokens == 64 * 7
    assert model.training
