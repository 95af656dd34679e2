"""Dense layers in float8: close to the plain step, and gone without a trace afterwards."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from mogul.core.errors import ConfigError
from mogul.train.float8 import float8_linears
from mogul.train.session import Session


def _losses(recipe, folder, kind, **changes):
    with Session(recipe(run__float8=kind, run__compile=False, **changes), folder) as session:
        losses = [session.take_step()[0].loss for _ in range(4)]
        kinds = {type(m).__name__ for m in session.model.modules() if isinstance(m, nn.Linear)}
    return losses, kinds, session.model


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_float8_stays_close_to_plain_products(recipe, tmp_path, kind):
    pytest.importorskip("torchao", reason="the optional package torchao is not installed")
    plain, _, _ = _losses(recipe, tmp_path / "plain", "none")
    rounded, kinds, model = _losses(recipe, tmp_path / kind, kind)
    assert "Float8Linear" in kinds
    assert rounded == pytest.approx(plain, abs=0.05)
    assert rounded != plain
    # The model is as before: its own layers, its own parameters, names of a plain checkpoint.
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not any("float8" in name for name in model.state_dict())


def test_only_dense_layers_that_fit_take_part(tiny_model):
    model = tiny_model()
    names = {name.rsplit(".", 1)[-1] for name in float8_linears(model)}
    assert names <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "q_proj" in names
    odd = nn.Linear(24, 32)
    model.model.layers[0].self_attn.q_proj = odd
    assert all(module is not odd for module in float8_linears(model).values())
    assert all(module is not model.lm_head for module in float8_linears(model).values())


def test_without_torchao_the_recipe_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"needs the package torchao"):
        _losses(recipe, tmp_path, "rowwise")


def test_a_device_without_float8_is_refused(monkeypatch):
    from mogul.train import float8

    class Old:
        @staticmethod
        def get_device_capability(_):
            return (8, 0)

        @staticmethod
        def get_device_name(_):
            return "an older card"

    monkeypatch.setattr(torch, "get_device_module", lambda _: Old)
    with pytest.raises(ConfigError, match="an older card has no float8 products"):
        float8._refuse_device(torch.device("meta"))
