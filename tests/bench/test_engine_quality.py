"""Quality through the engine: rows against a plain forward of the same module, tiny models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mogul.bench.engine_quality import Case, engine_qualities, same_picks, standard_error
from mogul.models import load_model, upcycle
from mogul.models.input_stats import measure_stats
from mogul.models.quantise import quantise_model
from mogul.models.quantise_linears import quantise_linears
from mogul.train.data import Windows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=None,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    folder, calibrated = (tmp_path_factory.mktemp(name) for name in ("model", "calibrated"))
    upcycle(LlamaForCausalLM(config).eval(), num_experts=8, num_groups=4).save_pretrained(folder)
    batches = [torch.from_numpy(windows(1).ids)]
    measure_stats(load_model(folder), batches, checkpoint=folder).save(calibrated)
    return folder, calibrated


def windows(seed: int = 0) -> Windows:
    ids = np.random.default_rng(seed).integers(0, 64, (5, 32))
    return Windows(ids=ids, bytes_per_token=np.ones_like(ids))


def bits_of(model) -> float:
    ids = torch.from_numpy(windows().ids)
    with torch.no_grad():
        scores = model(ids).logits[:, :-1].log_softmax(-1)
    return -float(scores.gather(2, ids[:, 1:, None]).mean()) / math.log(2)


def test_rows_are_those_of_plain_forwards(folders):
    folder, calibrated = folders
    cases = [Case("fp8", False, True), Case("fp8"), Case(None, True), Case("int4-32", True, False)]
    kind = {"calibrated": calibrated, "device": "cpu", "record_experts": True}
    rows = list(engine_qualities("tiny", folder, windows(), cases, **kind))
    assert [row.case.name for row in rows] == [
        "none", "fp8", "fp8", "fp8 cache", "int4-32 and fp8 cache",
    ]  # fmt: skip
    assert (rows[0].loss, rows[0].same_top1, rows[0].same_picks) == (0.0, 1.0, 1.0)
    assert rows[0].bits_per_byte == pytest.approx(bits_of(load_model(folder)), rel=1e-5)
    twin = quantise_model(load_model(folder), "fp8")
    quantise_linears(twin)
    assert rows[2].bits_per_byte == pytest.approx(bits_of(twin), rel=1e-4)
    assert rows[1].bits_per_byte != rows[2].bits_per_byte, "statistics change the rounding"
    for row in rows[1:]:
        assert row.loss == row.bits_per_byte / rows[0].bits_per_byte - 1
        assert row.same_picks is not None
        assert 0.7 < row.same_picks < 1
        assert 0.7 < row.same_top1 < 1
        assert row.num_tokens == 5 * 31


def test_the_error_is_that_of_a_ratio_over_windows():
    dice = np.random.default_rng(0)
    before = dice.uniform(80, 120, (2000, 50))
    worse = before * 1.01 + dice.normal(0, 1, before.shape)
    ratios = worse.sum(1) / before.sum(1) - 1
    errors = [standard_error(a, b) for a, b in zip(worse, before, strict=True)]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.05)
    assert standard_error(before[0] * 1.01, before[0]) == pytest.approx(0, abs=1e-9)


def test_picks_are_counted_slot_by_slot_whatever_their_order():
    before = np.array([[[0, 2], [1, -1]], [[3, 1], [2, 0]]])
    after = np.array([[[2, 0], [1, 5]], [[3, 0], [1, 3]]])
    assert same_picks(before, after) == 4 / 7
    assert same_picks(None, after) is None
