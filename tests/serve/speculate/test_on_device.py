"""On a device: guesses that never leave it change nothing and stand as on a processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mogul.models import load_model, load_tokenizer
from mogul.serve import Engine, SamplingParams
from mogul.serve.options import EngineOptions
from mogul.serve.speculate import DraftLength, Speculator
from mogul.serve.speculate.mtp import MtpProposer
from mogul.train.data import shipped_text

pytestmark = pytest.mark.gpu


def generate(device: Any, compiled: bool, **kind: Any) -> tuple[list[tuple[int, ...]], Any]:
    """Greedy answers of nano to five prompts, and the guesser."""
    ids = load_tokenizer("nano")(shipped_text().held_out[0][:8000])["input_ids"]
    prompts = [ids[90 * i : 90 * i + 40 + 11 * i] for i in range(5)]
    speculator = Speculator(MtpProposer(**kind), DraftLength(3, fixed=True)) if kind else None
    options = EngineOptions(
        max_sequences=4, max_length=200, cache_tokens=1600, compile=compiled, seed=0
    )
    model = load_model("nano", dtype="float16", device=device)  # fp32 there is never captured
    engine = Engine(model, None, options, speculator=speculator)
    assert engine.runner.ladder is not None, "steps are captured"
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    answers = [answer.token_ids for answer in engine.generate(prompts, params)]
    engine.check()
    captured = kind and engine.speculator and getattr(engine.speculator.proposer, "_chain", None)
    if captured:
        assert captured._calls, "the chain is captured"
    engine.close()
    return answers, speculator


@pytest.mark.parametrize("compiled", [False, True])
def test_the_captured_chain_guesses_as_the_plain_layer(compiled: bool) -> None:
    device = torch.accelerator.current_accelerator()
    plain, _ = generate(device, compiled=False)
    step_by_step, eager = generate(device, compiled=False, follow=False)
    on_device, chained = generate(device, compiled, follow=True)
    for found in (step_by_step, on_device):
        assert sum(a == b for a, b in zip(found, plain, strict=True)) >= 4, "near ties aside"
    assert eager.stats.acceptance[0] > 0.4
    for position in range(3):
        assert chained.stats.acceptance[position] == pytest.approx(
            eager.stats.acceptance[position], abs=0.1
        )
