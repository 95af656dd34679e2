"""The whole demo on a tiny random llama: the same code path, other sizes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mogul.bench.demo.cast import DemoSettings
from mogul.bench.demo.cells import MAX_STEPS_MEASURED, decode_steps, device_counts, measure
from mogul.bench.demo.diagram import layer_diagram
from mogul.bench.demo.learning import copy_distance, share_in_group
from mogul.core.errors import ArtifactError, ConfigError
from mogul.spec.grouping import Grouping

SETTINGS = DemoSettings(
    num_experts=8, num_groups=4, prompts=("One?", "Two?", "Three?"), new_tokens=4,
    batch_sizes=(1, 4), context_tokens=12, decode_steps=4, seconds=600, window_tokens=24,
    batch_windows=2, held_out_windows=4, lr=1e-3, warmup_steps=2, max_steps=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo(checkpoint, tmp_path_factory):
    from mogul.bench.demo.run import run_demo

    folder = tmp_path_factory.mktemp("out") / "demo"
    tables = []
    result = run_demo(checkpoint, folder, SETTINGS, show=tables.append, model="tiny <llama>")
    return result, folder, tables


def test_act_one_is_exact(demo):
    result, _, _ = demo
    assert max(result.exact.largest_logit_difference.values()) < 1e-5
    assert result.exact.largest_logit > 0.01
    assert [answer.same_tokens for answer in result.exact.answers] == [True] * 3
    assert all(answer.dense == answer.moge for answer in result.exact.answers)


def test_act_two_measures_every_cell(demo):
    result, _, _ = demo
    cells = {(c.model, c.batch, c.devices): c for c in result.balance.cells}
    assert set(cells) == {
        *(("MoGE", batch, devices) for batch in (1, 4) for devices in (2, 4)),
        *(("twin", batch, 2) for batch in (1, 4)),
    }
    for (model, batch, devices), cell in cells.items():
        assert cell.by_construction == (model == "MoGE")
        if model == "MoGE":
            assert (cell.rho.mean, cell.rho.worst, cell.imbalance.worst) == (1.0, 1.0, 0.0)
            assert cell.mean_rows == cell.busiest_rows == batch * 4 / devices
        assert cell.delta.mean >= 1
    # One token on one of two devices: the busiest has twice the mean.
    assert cells["twin", 1, 2].rho.mean == 2.0
    rows = np.asarray(result.balance.example["twin"])
    np.testing.assert_allclose(rows.mean(axis=0), 1)


def test_act_three_trains_all_on_the_same_tokens(demo):
    result, _, _ = demo
    moge, twin, dense = result.learning.learners
    assert [moge.model, twin.model, dense.model] == ["MoGE", "twin", "dense"]
    assert {one.training.tokens for one in result.learning.learners} == {6 * 2 * 24}
    for one in result.learning.learners:
        assert one.after.nats_per_token < one.before.nats_per_token
        assert one.before.nats_per_token == pytest.approx(dense.before.nats_per_token, abs=1e-4)
    for one in (moge, twin):
        assert one.copy_distance is not None
        assert one.copy_distance > 1e-4
        assert one.routing_after is not None
        assert 0 <= one.routing_after.smallest_share <= 0.5
    assert dense.copy_distance is None
    assert {cell.picks for cell in moge.balance_after} == {"trained"}


def test_report_json_holds_the_numbers(demo):
    result, folder, _ = demo
    data = json.loads((folder / "report.json").read_text())
    assert data["schema"] == "mogul.demo/1"
    assert data["settings"]["num_groups"] == 4
    assert data["peak_memory_bytes"] > 1e7
    assert set(data["seconds"]) == {"all", "act 1", "act 2", "act 3"}
    assert {"mogul", "torch", "transformers"} <= set(data["versions"])
    losses = data["learning"]["learners"][0]["training"]["losses"]
    assert losses == list(result.learning.learners[0].training.losses)
    assert len(data["balance"]["cells"]) == 6


def test_report_page_says_what_must_be_said(demo):
    _, folder, _ = demo
    text = (folder / "report.html").read_text().split("<body>")[1]
    words = re.sub(r"<script.*?</script>|<[^>]+>", "", text, flags=re.DOTALL)
    for needed in ("by construction", "does not show that it is better", "random", "delta"):
        assert needed in words
    assert "tiny &lt;llama&gt;" in text
    assert text.count("<figure>") == 7
    pngs = sorted(path.stem for path in folder.glob("*.png"))
    assert pngs == ["devices", "experts", "held_out", "loss", "rows", "shares"]


def test_every_act_ends_with_a_table(demo):
    _, _, tables = demo
    assert [table.title[:5] for table in tables] == ["Act 1", "Act 2", "Act 3"]
    for table in tables:
        out = io.StringIO()
        table.show(file=out)
        assert out.getvalue().strip()


def test_uniform_picks_of_two_devices_match_theory():
    """Batch 2 on 2 devices, one pick of 2 experts: rho is 2 or 1 with equal chance."""
    grouping = Grouping(num_experts=2, num_groups=1, top_k=1)
    ids = np.random.default_rng(0).integers(0, 2, (10, 8, 40, 1))
    cell = measure("twin", "uniform", ids, 2, 2, grouping)
    assert cell.steps == MAX_STEPS_MEASURED
    assert cell.rho.mean == pytest.approx(1.5, abs=0.06)
    assert cell.imbalance.mean == pytest.approx(0.5, abs=0.06)
    assert cell.delta.mean == pytest.approx(1.5, abs=0.06)


def test_steps_take_each_sequence_once():
    ids = np.arange(2 * 4 * 3).reshape(2, 4, 3, 1)
    steps = [step[:, 0].tolist() for step in decode_steps(ids, 2)]
    assert len(steps) == 2 * 2 * 3
    assert steps[0] == [0, 3]
    assert sorted(pick for step in steps for pick in step) == list(range(24))


def test_device_counts_are_those_each_can_use():
    settings = DemoSettings()
    assert device_counts("MoGE", settings) == (2, 4, 8)
    assert device_counts("twin", settings) == (2, 4)


def test_distance_and_shares_by_hand():
    grouping = Grouping(num_experts=4, num_groups=2, top_k=2)
    experts = type("Experts", (), {})()
    experts.gate_up_proj = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]], [[5.0, 0.0]], [[0.0, 5.0]]])
    experts.down_proj = torch.zeros(4, 1, 1)
    layer = type("Layer", (), {"mlp": type("Mlp", (), {"experts": experts})()})()
    model = type("M", (), {"model": type("N", (), {"layers": [layer]})()})()
    # Group 0: equal; group 1: sqrt(50) over 5.
    assert copy_distance(model, grouping) == pytest.approx(2**0.5 / 2)
    ids = np.array([[0, 2], [0, 3], [1, 3], [0, 3]])
    assert share_in_group(ids, grouping).tolist() == [0.75, 0.25, 0.25, 0.75]


def test_diagram_fills_one_pick_a_group():
    drawn = layer_diagram(DemoSettings().grouping, DemoSettings().twin_grouping)
    assert drawn.count('fill-opacity="0.9"') == 8 + 8 + 8
    assert "8 groups of 4 copies" in drawn


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_groups": 5}, "32 experts cannot stand in 5 equal groups"),
        ({"decode_steps": 48}, "48 decode steps need a longer context"),
        ({"batch_sizes": (1, 6, 64)}, r"batch sizes \[6\] do not divide the largest, 64"),
    ],
)
def test_settings_refuse_nonsense(changes, words):
    with pytest.raises(ConfigError, match=words):
        DemoSettings(**changes)


def test_a_folder_that_cannot_be_is_refused_at_once(checkpoint, tmp_path):
    from mogul.bench.demo.run import run_demo

    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot write .*file"):
        run_demo(checkpoint, tmp_path / "file", SETTINGS)


@pytest.mark.full
@pytest.mark.timeout(1800)  # two to ten minutes, as busy as the machine is
def test_the_real_demo(tmp_path):
    """SmolLM2, all three acts, a short third one, in the memory that is promised."""
    command = [sys.executable, "-m", "mogul.cli.main", "demo", "--seconds", "5", "--format", "json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "demo")], capture_output=True, text=True,
        env=os.environ, timeout=1700, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(done.stdout)
    assert data["exact"]["largest_logit_difference"]["MoGE"] < 1e-3
    assert all(answer["same_tokens"] for answer in data["exact"]["answers"])
    assert "Paris" in data["exact"]["answers"][0]["moge"]
    assert data["peak_memory_bytes"] <= 8e9
    assert (tmp_path / "demo" / "report.html").stat().st_size > 4e6
