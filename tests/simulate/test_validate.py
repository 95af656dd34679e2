import json
import re
from pathlib import Path

import numpy as np
import pytest

from mogul.simulate import curves
from mogul.simulate.calibration import shipped
from mogul.simulate.measurements import KernelTable, load_shipped
from mogul.simulate.run import Setting, predict
from mogul.simulate.validate import own, published, silicon, training, vllm
from mogul.simulate.validate.kernels import leave_one_model_out
from mogul.simulate.validate.scoreboard import Bar, scores, statistics
from mogul.spec.hardware import hardware
from mogul.spec.presets import config
from mogul.spec.workload import Workload


def row(**given):
    base = {
        "id": "x", "backend": "vllm", "tp_size": "8", "attention_dp_size": "1",
        "moe_tp_size": "8", "moe_ep_size": "1", "batch_size": "16",
        "silicon_data_source": "a; silicon_concurrency=64; b",
    }  # fmt: skip
    return {**base, **given}


def test_layouts_are_read_as_what_a_node_can_hold():
    assert silicon.reading(row()) == silicon.Reading(8, 1, 8, 1, 64)
    squared = row(tp_size="64", moe_tp_size="8", moe_ep_size="8")
    assert silicon.reading(squared) == silicon.Reading(8, 1, 1, 8, 64)
    copies = row(tp_size="4", attention_dp_size="4", moe_tp_size="1", moe_ep_size="16")
    assert silicon.reading(copies) == silicon.Reading(1, 4, 1, 4, 64)
    unsaid = row(tp_size="1", attention_dp_size="", moe_tp_size="4", silicon_data_source="none")
    assert silicon.reading(unsaid) == silicon.Reading(1, 4, 4, 1, 64)
    assert silicon.reading(row(tp_size="3")) is None


def test_the_constant_of_a_backend_comes_from_its_fifth_of_the_rows():
    rows = [silicon.Scored(f"row {i}", "vllm", 2.0, 1.0) for i in range(400)]
    share = sum(one.is_for_fitting for one in rows) / len(rows)
    assert 0.14 < share < 0.26
    held = [
        one if one.is_for_fitting else silicon.Scored(one.row_id, "vllm", 9.0, 1.0) for one in rows
    ]
    assert silicon.fit_scales(held) == {"vllm": 2.0}  # the other rows have no say


def test_statistics():
    rows = [silicon.Scored(str(i), "a", 10.0 + i, 11.0 + i) for i in range(9)]
    rows.append(silicon.Scored("none", "a", 1.0, None, "too odd"))
    found = statistics(rows, {})
    assert found["coverage"] == pytest.approx(0.9)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["median"] == pytest.approx(1 / 14, rel=0.01)
    assert Bar("x", "y", 0.1, 0.2).holds
    assert not Bar("x", "y", 0.1, 0.2, is_upper=False).holds


def test_a_band_holds_what_lies_within_p10_and_p90():
    narrow = silicon.Scored("x", "vllm", 1.2, 1.0, sigma=0.1)
    assert not narrow.is_in_band
    assert silicon.Scored("x", "vllm", 1.2, 1.0, sigma=0.15).is_in_band
    assert not silicon.Scored("x", "vllm", 1.2, None, "too odd", sigma=9.0).is_in_band


def test_no_row_of_a_left_out_model_enters_its_prediction():
    table = next(one for one in load_shipped() if one.groups is not None)
    error, _, used = leave_one_model_out(table, curves.curve("generic", "moe"))
    assert len(error) == len(table)
    for label, others in used:
        assert label not in others
    # Corrupting a model's own times must not change what is predicted for it.
    held = table.groups == "shape-A"
    seconds = np.where(held, table.seconds * 7, table.seconds)
    spoiled = KernelTable(
        table.kind, table.device, table.engine, table.dtype, table.source, table.dims, seconds,
        table.groups,
    )  # fmt: skip
    changed, _, _ = leave_one_model_out(spoiled, curves.curve("generic", "moe"))
    np.testing.assert_allclose((changed[held] + 1) * 7, error[held] + 1, rtol=1e-9)


def test_published_numbers_are_no_source_of_blind_predictions():
    """Provenance: only rows marked fitted may be named as a source of their device's curves."""
    fitted = {one.name for one in published.pangu_rows() if one.is_fitted}
    blind = {one.name for one in published.pangu_rows() if not one.is_fitted}
    for architecture in ("ascend", "ascend-310p"):
        source = curves.curve(architecture, "moe").source
        assert all(name in source for name in fitted)
        assert not any(name in re.split("[ ,():;]+", source) for name in blind)
    for device in ("h100", "h800", "h20", "ascend-910c-die"):
        point = predict(
            Setting(published.model("qwen3-30b-a3b"), hardware(device)),
            Workload(batch=1, input_tokens=64),
            check_memory=False,
        )
        told = " ".join(s for one in point.decode.operators for s in one.estimate.sources)
        for word in ("InferSim", "LMSYS", "2506.12708", "silicon_sample", "open-infra"):
            assert word not in told


def test_a_measured_deployment_cannot_change_its_prediction(monkeypatch):
    monkeypatch.setattr(silicon, "_config", lambda _: config("qwen3-30b-a3b"))
    monkeypatch.setattr(silicon, "with_aiconfigurator", lambda _: shipped("vllm"))
    monkeypatch.setattr(silicon.aiconfigurator, "collective_tables", lambda *_: None)
    given = {"system": "h200_sxm", "model_path": "x", "isl": "1024", "osl": "128",
             "gemm_quant_mode": "", "moe_quant_mode": ""}  # fmt: skip
    one, other = (
        silicon.score(row(**given, silicon_tpot_ms=tpot, silicon_ttft_ms=tpot))
        for tpot in ("10", "30")
    )
    assert one.measured_s * 3 == pytest.approx(other.measured_s)
    assert one.predicted_s == other.predicted_s > 0


def test_the_own_engine_is_predicted_from_kernels_alone(monkeypatch):
    plain = own.steps()
    (score,) = scores(("own",))
    assert score.bars[0].holds
    unscored = [one.name.split(", ")[-1] for one in plain if one.note]
    assert unscored == ["decode 1", "prompts 100", "prompts 512", "decode 1"]
    data = own.load("own")
    for run in data["run"]:
        run["step_ms"] = [3 * value for value in run["step_ms"]]
    monkeypatch.setattr(own, "load", lambda _: data)
    spoiled = own.steps()
    assert [one.predicted_s for one in spoiled] == [one.predicted_s for one in plain]
    assert spoiled[0].measured_s == pytest.approx(3 * plain[0].measured_s)


LEDGER = Path(__file__).parents[2] / "benchmarks" / "ledger.jsonl"


@pytest.mark.skipif(not LEDGER.exists(), reason="the ledger is not part of an installed package")
def test_own_measured_steps_are_rows_of_the_ledger():
    rows = [json.loads(line) for line in LEDGER.read_text().splitlines()]
    known = {(row["commit"], row["bench"], row["value"]) for row in rows}
    steps = {(r["commit"], r["batch"], r["step_ms"]) for r in rows if r["bench"] == "engine_most"}
    for run in published.load("own")["run"]:
        commit = run["source"].partition("commit ")[2].partition(":")[0]
        if "bench_engine.py" not in run["source"]:
            continue
        for batch, ms in zip(run["batch"], run["step_ms"], strict=True):
            assert (commit, "engine", ms) in known or (commit, batch, ms) in steps, run["name"]
        for one in run.get("prompts", ()):
            value = one.get("ms", one.get("tokens_per_s"))
            assert (commit, "engine", value) in known, run["name"]
    for run in published.load("own")["training"]:
        step_s = {row.get("step_s") for row in rows if row["bench"] == "train"}
        assert run["step_ms"] / 1e3 in step_s


def test_own_training_is_predicted_and_shown():
    fixed, pangu = own.training_steps()
    assert 0.5 < fixed.predicted_s / fixed.measured_s < 2
    assert 0.8 < pangu.predicted_s / pangu.measured_s < 1.2
    told = " ".join(scores(("own",))[0].table.notes)
    assert "1,111 ms measured" in told
    assert "72 GiB, predicted" in told


def test_vllm_points_hold_their_bar():
    points = vllm.points()
    assert len(points) == 9
    assert [one.batch for one in points if one.is_cliff] == [96, 64]
    (score,) = scores(("vllm",))
    assert score.bars[0].holds


def test_pangu_ratios_and_acceptance():
    ratios = published.dense_ratios()
    assert ratios["dense 32B"][1] == pytest.approx(1.18, rel=0.08)
    assert ratios["dense 72B"][1] == pytest.approx(1.97, rel=0.12)
    drafts = published.implied_acceptance()
    assert 0.5 < drafts["1,148 -> 1,528"]["acceptance"] < 0.7
    assert 0.3 < drafts["201 -> 321"]["acceptance"] < 0.7
    (score,) = scores(("published",))
    assert score.bars[0].holds


def test_chips_of_a_family_lend_each_other_arithmetic_but_not_memory():
    for kind in ("gemm", "moe"):
        big, small = (curves.curve(name, kind) for name in ("ascend", "ascend-310p"))
        assert (small.compute, small.floor_s) == (big.compute, big.floor_s)
        assert small.memory == curves.curve("generic", kind).memory
    rows = {row.name: row for row in published.pangu_rows()}
    for name, limit in (("duo-prefill", 0.35), ("duo-decode-80", 0.15), ("duo-decode-1", 0.15)):
        assert abs(published.predict_row(rows[name]) / rows[name].measured_s - 1) < limit


def test_training_imbalance_shrinks_with_length():
    ratios = training.balance_ratios()
    assert [one[3] for one in ratios] == [True, False, False, False]
    assert all(abs(mine - paper) < 0.06 for _, paper, mine, _ in ratios)
