"""A recipe with a multi-token-prediction layer: trained, told apart, exported, resumed."""

from __future__ import annotations

import math

import torch

from mogul.models import load_model
from mogul.train.metrics import METRICS_FILE, read_lines
from mogul.train.session import MODEL, Session

KEYS = {"num_nextn_predict_layers": 1, "mtp_loss_coef": 0.5}


def run(recipe, folder, steps: int, *, resume: bool = False, **changes):
    made = recipe(model__config=KEYS, run__steps=steps, **changes)
    with Session(made, folder, resume=resume) as session:
        assert session.run()
        return session


def test_the_layer_learns_and_its_loss_stands_in_the_log(recipe, tmp_path):
    rates = {"optimizer__lr": 1e-2, "log__every_steps": 1}
    run(recipe, tmp_path / "run", 30, **rates)
    lines = read_lines(tmp_path / "run" / METRICS_FILE)
    ahead = [line["mtp_loss"] for line in lines]
    # The whole loss is that of the next token and half of this one: both begin at log V.
    assert abs(lines[0]["loss"] - 1.5 * math.log(300)) < 0.3
    assert ahead[-1] < ahead[0] - 0.5
    model = load_model(tmp_path / "run" / MODEL, dtype="float32")
    assert model.has_mtp
    ids = torch.arange(1, 33)[None]
    assert model(ids, labels=ids).mtp_loss is None


def test_resumed_runs_end_with_the_same_layer(recipe, tmp_path):
    whole = run(recipe, tmp_path / "whole", 6)
    run(recipe, tmp_path / "parts", 3)
    resumed = run(recipe, tmp_path / "parts", 6, resume=True)
    layer = "model.layers.2."
    own = {n: p for n, p in whole.model.state_dict().items() if n.startswith(layer)}
    assert any("eh_proj" in name for name in own)
    for name, tensor in own.items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
