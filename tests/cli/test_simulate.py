import json

import pytest

from mogul.cli.main import main


def run(capsys, *args):
    code = main(["simulate", *args])
    out, err = capsys.readouterr()
    return code, out, err


def test_run_prints_a_point_and_json_in_base_units(capsys):
    code, out, _ = run(capsys, "run", "preset:qwen3-30b-a3b", "--batch", "4", "--loads")
    assert code == 0
    assert out.startswith("qwen3-30b-a3b on 1 x NVIDIA H100")
    assert "TPOT, p10 / p50 / p90" in out
    code, out, _ = run(capsys, "run", "preset:qwen3-30b-a3b", "--batch", "4", "--format", "json")
    data = json.loads(out)
    assert data["tpot_s"]["p10"] < data["tpot_s"]["p50"] < data["tpot_s"]["p90"] < 1
    assert data["expert_load"][0]["rho"] == 1.0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("run", "preset:qwen3-30b-a3b", "--device", "h10"), "unknown device 'h10'"),
        (("run", "preset:qwen3-30b-a3b", "--tp", "3"), "tp=3 does not divide the 32 query heads"),
        (("run", "preset:pangu-pro-moe-72b"), "too much; the largest part is weights"),
        (("run", "preset:qwen3-30b-a3b", "--quant", "fp9"), "unknown quantisation 'fp9'"),
        (("run", "preset:qwen3-30b-a3b", "--engine", "vlm"), "unknown engine 'vlm'"),
        (("sweep", "preset:qwen3-30b-a3b", "--tp", "2"), "--tp does nothing in `mogul simulate sw"),
        (("rum",), "unknown verb 'rum'"),
        (("serve", "preset:qwen3-30b-a3b", "--sequences", "0"), "sequences 0: nothing runs"),
        (("serve", "preset:qwen3-30b-a3b", "--seed", "-1"), "--seed -1 is below 0"),
        (("run", "preset:qwen3-30b-a3b", "--drafts", "5000"), "use at most 1024"),
        (("shape", "--tokens", "0"), "200 shapes trained on 0 tokens cannot be ranked"),
        (("shape", "--picks-per-group", "3"), "no shape fits the budgets"),
        (("serve", "preset:qwen3-30b-a3b", "--rate", "0"), "300 requests at 0 a second never"),
        (("serve", "preset:qwen3-30b-a3b", "--requests", "0"), "0 requests at 4 a second never"),
        (("serve", "preset:qwen3-30b-a3b", "--input", "0"), "a request of 0 input and 512 output"),
        (("shape", "--total", "8e10", "6e10"), "no shape has between 8e+10 and 6e+10 parameters"),
        (("train", "preset:qwen3-30b-a3b", "--tokens", "nan"), "--tokens nan take no time"),
        (("compare", "preset:qwen3-8b"), "is dense: it has nothing to group"),
        (("run", "preset:qwen3-30b-a3b", "--batch", "0"), "--batch 0 cannot be: it should be gr"),
        (("run", "preset:qwen3-30b-a3b", "--input", "-5"), "--input -5 cannot be"),
        (("run", "preset:qwen3-30b-a3b", "--max-tpot-ms", "-1"), "--max-tpot-ms -1.0 cannot be"),
        (("run", "preset:qwen3-30b-a3b", "--moe-tp", "0"), "--moe-tp 0 cannot be"),
        (("run", "preset:qwen3-30b-a3b", "--skew", "-1"), "--skew -1.0 cannot be"),
        (("run", "preset:qwen3-30b-a3b", "--drafts", "-1"), "--drafts -1 cannot be"),
        (("run", "preset:qwen3-30b-a3b", "--acceptance", "0.5"), "does nothing without --drafts"),
        (("train", "preset:qwen3-30b-a3b", "--sequence", "0"), "--sequence 0 cannot be"),
        (("train", "preset:qwen3-30b-a3b", "--mtp", "-1"), "--mtp -1 cannot be"),
    ],
)
def test_bad_input_is_wrong_usage(capsys, args, words):
    code, _, err = run(capsys, *args)
    assert code == 2
    assert words in err
    assert "fix: " in err


def test_hw_lists_and_shows(capsys):
    code, out, _ = run(capsys, "hw")
    assert code == 0
    assert "ascend-300i-duo" in out
    code, out, _ = run(capsys, "hw", "h200")
    assert "memory_bytes_per_s" in out
    assert "source" in out


def test_compare_shows_what_grouping_does(capsys):
    args = ("preset:pangu-pro-moe-72b", "--tp", "8", "--batch", "16", "--format", "json")
    _, out, _ = run(capsys, "compare", *args)
    free, grouped = json.loads(out)["rows"]
    assert grouped["rho"] == 1.0
    assert free["rho"] > 1.2


def test_sweep_writes_a_plan(capsys, tmp_path):
    from mogul.spec.plan import Plan

    plan = tmp_path / "plan.json"
    code, out, _ = run(
        capsys, "sweep", "preset:qwen3-30b-a3b", "--device", "h200", "--devices", "2",
        "--quants", "fp8", "--plan", str(plan), "--html", str(tmp_path / "page.html"),
    )  # fmt: skip
    assert code == 0
    assert "qwen3-30b-a3b on 2 x NVIDIA H200" in (tmp_path / "page.html").read_text()
    assert "points priced" in out
    assert Plan.read(plan).parallel.devices == 2


def test_train_says_when_it_does_not_fit(capsys):
    args = ("train", "preset:qwen3-30b-a3b", "--dp", "8", "--devices", "8")
    code, out, _ = run(capsys, *args, "--device", "h100")
    assert code == 1
    assert "DOES NOT FIT" in out
    code, out, _ = run(capsys, *args, "--device", "gb300", "--tokens", "1e11")
    assert code == 0
    assert "days for 1e+11 tokens" in out


def test_validate_prints_bars(capsys):
    code, out, _ = run(capsys, "validate", "--sets", "vllm", "pangu")
    assert code == 0
    assert "holds" in out
    assert "acceptance" in out


def test_a_report_page(capsys, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "point.html"
    code, _, _ = run(
        capsys, "run", "preset:pangu-pro-moe-72b", "--tp", "8", "--batch", "8", "--html", str(page)
    )
    assert code == 0
    assert "Where the time goes" in page.read_text()
    other = tmp_path / "other.html"
    for args in (
        ("validate", "--sets", "vllm"),
        ("sweep", "preset:qwen3-30b-a3b", "--device", "h200", "--devices", "1"),
        ("compare", "preset:qwen3-30b-a3b", "--tp", "4", "--batch", "8"),
        ("serve", "preset:qwen3-30b-a3b", "--device", "h200", "--requests", "5", "--output", "9"),
        ("train", "preset:qwen3-30b-a3b", "--dp", "8", "--device", "gb300"),
        ("shape", "--candidates", "2", "--targets", "ascend-910b:4:60"),
    ):
        code, _, err = run(capsys, *args, "--html", str(other))
        assert code == 0, err
        assert "</html>" in other.read_text()
        other.unlink()


def test_calibrate_feeds_run(capsys, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "mine"
    code, _, err = run(
        capsys, "calibrate", "--device", "cpu-avx512", "--out", str(out), "--dtype", "fp32",
        "--small",
    )  # fmt: skip
    assert code == 0
    assert "machine.json" in err
    flags = ("--device", "cpu-avx512", "--measured", str(out), "--format", "json")
    code, text, _ = run(capsys, "run", "preset:smollm2-135m", "--batch", "1", *flags)
    assert code == 0
    assert json.loads(text)["tpot_s"]["p50"] > 0
    code, _, err = run(capsys, "run", "preset:smollm2-135m", "--measured", str(tmp_path))
    assert code == 1
    assert "holds no measured tables" in err


def test_machine_json_is_read_back(capsys, tmp_path):
    pytest.importorskip("torch")
    flags = ("--out", str(tmp_path), "--dtype", "fp32", "--small")
    assert run(capsys, "calibrate", "--device", "cpu-avx512", *flags)[0] == 0
    machine = ("--machine", str(tmp_path / "machine.json"))
    code, _, err = run(
        capsys, "run", "preset:smollm2-135m", "--device", "cpu-avx512", "--batch", "1", *machine
    )
    assert code == 0, err
    code, _, err = run(capsys, "run", "preset:smollm2-135m", "--device", "h100", *machine)
    assert code == 2
    assert "use --device cpu-avx512" in err


def test_pages_show_every_part(capsys, tmp_path):
    page = tmp_path / "page.html"
    common = ("Where the time goes", "Memory of the fullest device", "Expected load of every rank",
              "TPOT saved by a machine", "Predicted against measured",
              "Throughput against speed for the user")  # fmt: skip
    flags = ("--html", str(page))
    assert run(capsys, "run", "preset:qwen3-30b-a3b", "--dp", "2", "--batch", "8", *flags)[0] == 0
    text = page.read_text()
    assert all(title in text for title in common)
    assert run(capsys, "sweep", "preset:qwen3-30b-a3b", "--devices", "2", *flags)[0] == 0
    text = page.read_text()
    assert all(title in text for title in (*common, "Deployments nothing beats"))
    code, _, _ = run(capsys, "validate", "--sets", "training", *flags)
    assert code == 0
    assert "every row" in page.read_text()
