"""The quality table: its arithmetic on a tiny model, and the bars on the real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mogul.bench.kv_quality import kv_qualities
from mogul.bench.quant_quality import as_one_expert, qualities, subjects_of
from mogul.spec.grouping import Grouping
from mogul.train.data import Windows

MOST_WORSE = {"fp8": 0.005, "int4-32": 0.03, "int4-64": 0.03, "int4-128": 0.03}
MOST_WORSE_CACHE = 0.003


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def windows(count: int = 4) -> Windows:
    ids = np.random.default_rng(0).integers(0, 64, (count, 32))
    return Windows(ids=ids, bytes_per_token=np.ones_like(ids))


def test_one_expert_is_the_dense_model(tiny):
    ids = torch.from_numpy(windows().ids)
    with torch.no_grad():
        torch.testing.assert_close(as_one_expert(tiny)(ids).logits, tiny(ids).logits)


def test_every_row_compares_with_its_own_model(tiny):
    grouping = Grouping(num_experts=8, num_groups=4, top_k=4)
    rows = [
        row
        for subject in subjects_of(tiny, windows(), windows(2), grouping)
        for row in qualities(subject, formats=("fp8", "int4-64"))
    ]
    assert [(row.model, row.format, row.calibrated) for row in rows] == [
        (model, format_name, calibrated)
        for model in ("dense", "upcycled")
        for format_name, calibrated in [
            ("none", False), ("fp8", True), ("fp8", False), ("int4-64", True), ("int4-64", False),
        ]
    ]  # fmt: skip
    for row in rows:
        assert (row.same_picks is None) == (row.model == "dense")
        assert row.same_top1 > 0.8
        assert abs(row.loss) < 0.02
        assert (row.loss == 0) == (row.format == "none")
    assert rows[3].expert_bits == 4.5


def test_linear_layers_may_be_fp8_too(tiny):
    subject = subjects_of(tiny, windows(), windows(2))[0]
    none, experts = qualities(subject, formats=("fp8",), calibrated=(False,))
    _, both = qualities(subject, formats=("fp8+linears",), calibrated=(False,))
    assert both.bits_per_byte not in (none.bits_per_byte, experts.bits_per_byte)
    assert abs(both.loss) < 0.02


def test_a_cache_in_fp8_is_compared_with_the_same_engine(tiny):
    subject = subjects_of(tiny, windows(), windows(2))[0]
    (plain, *_) = qualities(subject, formats=(), calibrated=())
    rows = list(kv_qualities(subject))
    assert [row.calibrated for row in rows] == [False, True]
    for row in rows:
        assert 0 < abs(row.loss) < 0.01
        assert 0 < row.error < 0.01
        assert row.bits_per_byte == pytest.approx(plain.bits_per_byte * (1 + row.loss), rel=1e-4)
        assert 0.9 < row.same_top1 <= 1


@pytest.fixture(scope="module")
def smollm2_text():
    from mogul.bench.smollm2 import smollm2_checkpoint
    from mogul.models import load_model, load_tokenizer
    from mogul.train.data import shipped_text, token_windows

    checkpoint = smollm2_checkpoint()
    dense, tokenizer, text = load_model(checkpoint), load_tokenizer(checkpoint), shipped_text()
    held_out = token_windows(text.held_out, tokenizer, 256)
    return dense, held_out, token_windows(text.train, tokenizer, 256).spread(16)


@pytest.fixture(scope="module")
def smollm2(smollm2_text):
    dense, held_out, calibration = smollm2_text
    return subjects_of(dense, held_out.spread(8), calibration)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_quality_bars_on_smollm2(smollm2):
    for subject in smollm2:
        for row in qualities(subject, calibrated=(True,)):
            assert row.loss <= MOST_WORSE.get(row.format, 0), row
            assert row.same_top1 > 0.75, row
            assert row.same_picks is None or row.same_picks > 0.9, row


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_bar_of_fp8_caches_on_smollm2(smollm2_text):
    """Single windows wander by more than the bar: what is above it for sure fails."""
    dense, held_out, calibration = smollm2_text
    for subject in subjects_of(dense, held_out.spread(24), calibration):
        for row in kv_qualities(subject):
            assert row.loss - 2 * row.error <= MOST_WORSE_CACHE, row
            assert row.error < MOST_WORSE_CACHE, row
