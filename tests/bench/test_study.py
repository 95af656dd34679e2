"""The study's arithmetic: balance numbers, Student's t, the smallest detectable difference."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def study():
    file = Path(__file__).parents[2] / "benchmarks" / "bench_study.py"
    spec = importlib.util.spec_from_file_location("bench_study", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_study"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("share", "freedom", "expected"),
    [(0.975, 10, 2.2281), (0.975, 4, 2.7764), (0.8, 10, 0.8791), (0.975, 1000, 1.9623)],
)
def test_t_quantiles_are_those_of_the_tables(study, share, freedom, expected):
    assert study.t_quantile(share, freedom) == pytest.approx(expected, rel=0.01)


def test_detectable_difference(study):
    values = {"a": [1.0, 1.2, 1.4], "b": [2.0, 2.2, 2.4], "c": [5.0]}
    pooled, smallest = study.detectable(values)
    assert pooled == pytest.approx(0.2)
    expected = (2.7764 + 0.9410) * 0.2 * (2 / 3) ** 0.5  # t tables, 4 degrees of freedom
    assert smallest == pytest.approx(expected, rel=0.01)
    assert study.detectable({"a": [1.0]}) is None


def test_differences_are_taken_seed_by_seed(study):
    def run(variant, seed, bits):
        return {"variant": variant, "seed": seed, "bits_per_byte": bits}

    runs = [run("topk-aux", s, 1.0 + s) for s in range(3)]
    runs += [run("moge4", s, 1.1 + s + 0.01 * s) for s in range(3)] + [run("moge8", 7, 9.0)]
    gaps = study.gaps_by_seed(runs)
    assert list(gaps) == ["moge4 less topk-aux"]
    assert gaps["moge4 less topk-aux"] == pytest.approx([0.1, 0.11, 0.12])
    *_, last = study.differences(runs)
    smallest = (4.3027 + 1.0607) * 0.01 / 3**0.5  # t tables, 2 degrees of freedom
    assert float(last.split()[-4]) == pytest.approx(smallest, rel=0.1)


def test_few_tokens_say_nothing_of_large_steps(study):
    picks = np.random.default_rng(0).integers(0, 64, (1, 100, 8))
    found = study.balance_numbers(picks, 64, 1)
    assert "D8 T64" in found["rho"]
    assert "D8 T512" not in found["rho"]
    assert study.mean_of([found], "rho", "D8 T512") is None


def test_grouped_picks_have_rho_one_where_devices_divide_the_groups(study):
    rng = np.random.default_rng(0)
    picks = rng.integers(0, 16, (2, 4096, 4)) + 16 * np.arange(4)  # 4 groups of 16
    found = study.balance_numbers(picks, 64, 4)
    assert found["rho"]["D2 T16"] == found["rho"]["D4 T512"] == 1.0
    assert found["rho"]["D8 T16"] > 1.05
    assert found["delta"]["D4 T16"] > 1.0
    assert found["dead_experts"] == 0
    flat = np.broadcast_to(np.arange(8), (1, 4096, 8))
    stuck = study.balance_numbers(flat, 64, 1)
    assert stuck["max_vio"] == pytest.approx(7.0)
    assert stuck["dead_experts"] == 56
    assert stuck["rho"]["D8 T64"] == pytest.approx(8.0)


def test_scales_become_changes(study):
    changes = list(
        study.changes_of({"run": {"tokens": 5, "compile": False}, "model": {"a": {"b": "x"}}})
    )
    assert changes == ["run.tokens=5", "run.compile=false", 'model.a.b="x"']


def _options(folder, **more):
    values = {
        "results": folder / "study.jsonl", "out": folder, "seeds": [0, 1], "variants": ("moge2",),
        "scale": None, "jobs": 1, "deadline_s": None, "stop_s": None, "in_process": False,
    }  # fmt: skip
    return argparse.Namespace(**values, **more)


def test_finished_runs_are_not_run_again(study, tmp_path, monkeypatch):
    options = _options(tmp_path)
    options.results.write_text('{"scale": "study", "variant": "moge2", "seed": 0}\n')
    started = []

    class Done:
        def poll(self):
            return 0

    monkeypatch.setattr(study, "start", lambda _options, *key: started.append(key) or Done())
    assert study.run_all(options) == 0
    assert started == [("moge2", 1)]


def test_a_run_is_claimed_once_and_given_up_when_its_process_keeps_dying(study, tmp_path):
    options = _options(tmp_path)
    first = study.claim(options, "moge2", 1)
    assert first is not None
    assert study.claim(options, "moge2", 1) is None  # another worker has it
    first.write("begun\n")
    first.close()  # as when the process dies
    second = study.claim(options, "moge2", 1)
    second.write("begun\n")
    second.close()
    assert study.claim(options, "moge2", 1) is None
    other = study.claim(options, "moge2", 0)
    assert other is not None
    other.close()


def test_the_table_shows_dense_and_grouped_runs(study, capsys):
    def result(variant, seed, bits, **more):
        return {
            "scale": "s", "variant": variant, "seed": seed, "bits_per_byte": bits, "device": "d",
            "parameters": 10**6, "tokens": 10**6, "epochs": 1.0, "tokens_per_s": None, **more,
        }  # fmt: skip

    keys = ("D8 T16", "D8 T64", "D8 T512")
    balance = {"max_vio": 0.5, "dead_experts": 1, "rho": dict.fromkeys(keys, 1.25),
               "delta": dict.fromkeys(keys, 1.5)}  # fmt: skip
    study.show([
        result("smollm2-dense", 0, 1.0),
        result("smollm2-moge2", 0, 1.1, **balance),
        result("smollm2-moge2", 1, 1.3, **balance),
    ])  # fmt: skip
    shown = capsys.readouterr().out
    assert "1.2000" in shown
    assert "0.1414" in shown  # the sd of 1.1 and 1.3
    assert "smallest detectable difference" in shown
    assert "smollm2-dense" in shown
    assert "smollm2-moge2 less smollm2-dense: +0.1000 (1 common seeds)" in shown
