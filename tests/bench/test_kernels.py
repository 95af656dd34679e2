"""Timing of the experts layer: floors by hand, every variant checked, rows complete."""

from __future__ import annotations

import json
import time

import pytest
import torch

from mogul.bench import kernels, kernels_libraries
from mogul.bench.kernels_layer import Forward, Layer
from mogul.cli.main import main
from mogul.core import log
from mogul.core.errors import ConfigError, MogulError

TINY = kernels.LayerShape(experts=8, picks=2, width=32, inner=16, groups=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(kernels, "CELL_S", 0.0)
    monkeypatch.setitem(kernels.LIMIT_SIZE, "cpu", 64)


def test_shapes_are_read_by_size_or_asked_of_a_model():
    assert kernels.layer_shape("8x2x32x16x2", lambda _: ()) == TINY
    assert kernels.layer_shape("8x2x32x16", lambda _: ()).groups == 1
    assert kernels.layer_shape("some-model", lambda _: (8, 2, 32, 16, 2)) == TINY
    assert TINY.name == "8x2x32x16x2"


@pytest.mark.parametrize("sizes", [(8, 9, 32, 16), (8, 2, 0, 16), (8, 2, 32, 16, 3)])
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ConfigError):
        kernels.LayerShape(*sizes)


def test_sizes_that_are_no_shape_and_calls_of_nothing_are_refused():
    with pytest.raises(ConfigError, match="shape '3x8' has no four sizes"):
        kernels.layer_shape("3x8", pytest.fail)
    with pytest.raises(ConfigError, match="0 tokens of a call"):
        kernels.Request(TINY, tokens=(4, 0))


def test_the_floor_is_arithmetic_or_bytes():
    limits = kernels.Limits(flop_per_s=1e9, bytes_per_s=1e9)
    assert TINY.flop(10) == 6 * 10 * 2 * 32 * 16
    one = TINY.num_bytes(1, 2, 2)
    assert one == pytest.approx(2 * 3 * 32 * 16 * 2 + 2 * 32 * 2 + 24)  # one token: 2 experts
    many = TINY.num_bytes(10_000, 2, 2)
    assert many == pytest.approx(8 * 3 * 32 * 16 * 2 + 20_000 * 32 * 2 + 120_000 * 2)
    assert limits.floor_s(2e9, 1e9) == 2
    assert limits.floor_s(1e9, 3e9) == 3


def test_a_wrong_variant_shows_a_large_error():
    layer = Layer.random(TINY, torch.float32, torch.device("cpu"))
    inputs = layer.tokens(5)
    assert layer.error(Forward(lambda x, i, w: torch.zeros_like(x)), inputs) == pytest.approx(1)
    assert layer.error(Forward(lambda x, i, w: x / 0), inputs) == float("inf")
    groups = inputs[1] // 4
    assert groups.tolist() == [[0, 1]] * 5


@pytest.mark.parametrize("train", [False, True])
def test_every_variant_computes_the_same(train):
    request = kernels.Request(TINY, tokens=(1, 5), dtype="fp32", train=train)
    result = kernels.measure(request)
    assert {cell.variant for cell in result.cells} >= {"mogul", "transformers grouped_mm"}
    assert max(cell.error for cell in result.cells) < 1e-5
    assert "vllm" in result.absent
    shown = kernels.table(result)
    assert len(shown.rows) == len(result.cells)


def test_the_command_writes_complete_rows(tmp_path, capsys):
    words = ["--shape", "8x2x32x16", "--tokens", "3", "--format", "json", "--out", str(tmp_path)]
    assert main(["bench", "kernels", *words]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["variant"] == "mogul"
    (row,) = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert row["case"] == "8x2x32x16 fp32 mogul forward 3"
    assert row["ratio"] > 0
    assert "transformers eager" in row["peers"]


def test_only_the_peers_that_are_asked_for_run(capsys):
    words = ["--shape", "8x2x32x16", "--tokens", "3", "--format", "json"]
    assert main(["bench", "kernels", *words, "--peers", "eager"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["variant"] for row in rows] == ["mogul", "transformers eager"]
    assert main(["bench", "kernels", *words, "--peers", "grouped"]) == 2
    assert "no peer 'grouped' is known" in capsys.readouterr().err


def test_a_peer_that_compiles_is_named_while_it_does(monkeypatch, capsys):
    def slow(_layer):
        end, seen = time.monotonic() + 3, ""
        while "first call of sonicmoe" not in seen and time.monotonic() < end:
            time.sleep(0.01)
            seen += capsys.readouterr().err
        raise MogulError("was told of" if "first call of sonicmoe" in seen else "was hidden")

    monkeypatch.setattr(kernels_libraries, "sonicmoe", slow)
    monkeypatch.setattr(log, "SILENT_S", 0.3)
    monkeypatch.setattr(log, "PLAIN_EVERY_S", 0.05)
    request = kernels.Request(TINY, tokens=(1,), dtype="fp32", peers=("sonicmoe",))
    assert kernels.measure(request).absent == {"sonicmoe": "was told of"}


def test_a_dense_model_is_refused(capsys):
    assert main(["bench", "kernels", "--shape", "preset:smollm2-135m"]) == 2
    assert "has no experts" in capsys.readouterr().err


def test_quantised_experts_are_a_variant_with_their_own_floor():
    request = kernels.Request(TINY, tokens=(5,), dtype="fp32", quant="int4-32")
    cells = {cell.variant: cell for cell in kernels.measure(request).cells}
    assert cells["mogul int4-32"].num_bytes < cells["mogul"].num_bytes / 4
    assert 0.01 < cells["mogul int4-32"].error < 0.3
    with pytest.raises(ConfigError, match="no backward"):
        kernels.Request(TINY, train=True, quant="fp8")
