"""The quality table: its arithmetic on a tiny model, and the bars on the real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mogul.bench.quant_quality import as_one_expert, qualities
from mogul.spec.grouping import Grouping
from mogul.train.data import Windows

MOST_WORSE = {"fp8": 0.005, "int4-32": 0.03, "int4-64": 0.03, "int4-128": 0.03}


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
    rows = list(
        qualities(
            tiny, windows(), windows(2), formats=("fp8", "int4-64"),
            grouping=Grouping(num_experts=8, num_groups=4, top_k=4),
        )
    )  # fmt: skip
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


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_quality_bars_on_smollm2():
    from mogul.bench.smollm2 import smollm2_checkpoint
    from mogul.models import load_model, load_tokenizer
    from mogul.train.data import shipped_text, token_windows

    checkpoint = smollm2_checkpoint()
    dense, tokenizer, text = load_model(checkpoint), load_tokenizer(checkpoint), shipped_text()
    held_out = token_windows(text.held_out, tokenizer, 256).spread(8)
    calibration = token_windows(text.train, tokenizer, 256).spread(16)
    for row in qualities(dense, held_out, calibration, uncalibrated=False):
        assert row.loss <= MOST_WORSE.get(row.format, 0), row
        assert row.same_top1 > 0.75, row
        assert row.same_picks is None or row.same_picks > 0.9, row
