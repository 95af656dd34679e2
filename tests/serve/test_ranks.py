"""One engine over two ranks says what one process says; what it cannot be is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mogul.core.errors import ConfigError
from mogul.parallel import launch
from mogul.serve import Engine
from mogul.serve.kv_scales import KvScales
from mogul.serve.speculate import make_speculator
from mogul.spec.parallel import Parallel

sys.path.insert(0, str(Path(__file__).parent))  # so that the ranks find what they run

from rank_engine import answers


def test_two_ranks_say_what_one_says():
    alone, token_bytes, *_ = answers(None, None)
    ranks = launch(answers, 2, {"tp": 2, "ep": 2}, on_cpu=True, threads=1, timeout_s=200)
    for told, share_bytes, preemptions, (chosen, guessed) in ranks:
        assert told == ranks[0][0], "ranks draw alike, also from seeds nobody gave"
        assert chosen == ranks[0][3][0], "ranks whose clocks differ ask for the same guesses"
        assert {0, 1} <= set(chosen), "numbers of guesses were measured"
        assert guessed == [ids for ids, _ in told[:4]], "and no token changes"
        assert share_bytes == token_bytes // 2, "each keeps the pages of its own heads"
        assert preemptions > 0, "the cache is too small for all, and ranks give way alike"
    for (ids, logprobs), (want, expected) in zip(ranks[0][0][:8], alone[:8], strict=True):
        assert ids == want
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_each_rank_takes_the_scales_of_its_heads():
    layers = (torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([3.0]))
    scales = KvScales(layers, layers)
    assert [scale.tolist() for scale in scales.of_rank(1, 2).keys] == [[4.0, 8.0], [3.0]]
    assert [scale.tolist() for scale in scales.of_rank(0, 4).values] == [[1.0], [3.0]]
    with pytest.raises(ConfigError, match="scales of 4 heads cannot be cut for 3 ranks"):
        scales.of_rank(0, 3)


def test_what_is_no_single_engine_is_refused(tiny):
    with pytest.raises(ConfigError, match="dp=2 copies"):
        Engine(tiny.model("moge"), parallel=Parallel(dp=2))
    with pytest.raises(ConfigError, match="needs as many processes"):
        Engine(tiny.model("moge"), parallel=Parallel(tp=2))
    with pytest.raises(ConfigError, match="quantised weights cannot be cut"):  # before it is read
        Engine.from_pretrained("nowhere", parallel=Parallel(tp=2), quantise="fp8")
    with pytest.raises(ConfigError, match="multi-token-prediction layer cannot guess"):
        Engine(tiny.model("moge"), parallel=Parallel(tp=2), speculator=make_speculator("mtp"))
