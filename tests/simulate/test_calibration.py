import numpy as np
import pytest

from mogul.core.errors import ArtifactError, ConfigError
from mogul.simulate import curves, physics
from mogul.simulate.calibration import Calibration, many_rows_s, shipped, with_measured
from mogul.simulate.machine import read_machine
from mogul.simulate.measurements import (
    NEWER,
    SHIPPED_DIR,
    KernelTable,
    load_shipped,
    read_table,
    without_repeated,
)
from mogul.spec.hardware import hardware
from mogul.spec.quant import ARITHMETIC

H100 = hardware("h100")
SHAPE = {"hidden": 5120, "width": 1344, "weight_bytes": 2.0, "input_bytes": 2.0}


def test_a_measured_call_comes_back_as_measured():
    dims = {"rows": 512.0, "distinct": 63.988, **SHAPE}
    estimate = shipped("vllm").estimate("moe", dims, H100, "bf16")
    assert estimate.seconds == pytest.approx(0.000923, rel=0.02)
    assert estimate.tier == "measured"
    assert "mogul's own run" in estimate.sources[0]


def test_other_machines_borrow_from_their_architecture_then_from_curves():
    dims = {"rows": 512.0, "distinct": 63.988, **SHAPE}
    calibration = shipped("vllm")
    assert calibration.estimate("moe", dims, hardware("h800"), "bf16").tier == "transferred"
    unknown = calibration.estimate("moe", dims, hardware("mi300x"), "bf16")
    assert (unknown.tier, unknown.sigma) == ("guess", 0.4)


def test_far_from_every_measurement_the_curve_decides():
    dims = {"rows": 1e7, "distinct": 8.0, "hidden": 512, "width": 16384}
    dims |= {"weight_bytes": 2.0, "input_bytes": 2.0}
    estimate = shipped("vllm").estimate("moe", dims, H100, "bf16")
    demand = physics.demand("moe", dims)
    curve = curves.curve("hopper", "moe", "bf16").seconds(demand, H100, "bf16")
    assert estimate.seconds == pytest.approx(float(curve))


def test_no_time_is_below_the_roofline_by_much():
    for tokens in (1, 8, 64, 512, 4096):
        dims = {"rows": 8.0 * tokens, "distinct": 64 * (1 - 0.875**tokens), **SHAPE}
        demand = physics.demand("moe", dims)
        floor_s = max(demand.flop / 989e12, demand.moved_bytes / 3.35e12)
        assert shipped("vllm").estimate("moe", dims, H100, "bf16").seconds > 0.95 * floor_s


def test_only_the_experts_touched_are_read():
    few = physics.demand("moe", {"rows": 64, "distinct": 8, **SHAPE}).moved_bytes
    many = physics.demand("moe", {"rows": 64, "distinct": 64, **SHAPE}).moved_bytes
    assert many - few == pytest.approx(56 * 3 * 5120 * 1344 * 2)


def test_shipped_tables_say_who_measured():
    assert load_shipped()
    assert all("own run" in table.source for table in load_shipped())


def test_reference_tables_count_only_for_their_engine():
    dims = {"m": 4096.0, "n": 5120.0, "k": 5120.0, "weight_bytes": 1.0, "input_bytes": 1.0}
    table = next(
        t for t in load_shipped() if (t.kind, t.dtype, t.engine) == ("gemm", "fp8", "torch")
    )
    assert table.is_reference
    assert table.device == "h100"
    plain = shipped("vllm").estimate("gemm", dims, H100, "fp8")
    asked = shipped("torch").estimate("gemm", dims, H100, "fp8")
    assert plain.tier == "curve"
    assert asked.tier == "measured"
    at = (table.dims["m"] == 4096) & (table.dims["n"] == 5120)
    assert asked.seconds == pytest.approx(table.seconds[at][0], rel=0.05)


def test_many_rows_run_like_a_plain_product_where_only_others_were_measured():
    """mogul's own fp8 experts are measured; an engine without a table here may have better ones."""
    dims = {"rows": 131072.0, "distinct": 9.0, "hidden": 7168, "width": 2048}
    dims |= {"weight_bytes": 1.0, "input_bytes": 1.0}
    plain_s = many_rows_s(dims, H100, "fp8_block")
    assert shipped("sglang").estimate("moe", dims, H100, "fp8_block").seconds <= plain_s
    few = {**dims, "distinct": 256.0}
    assert many_rows_s(few, H100, "fp8_block") == float("inf")
    tables = (t for t in load_shipped() if (t.kind, t.dtype, t.device) == ("moe", "fp8", "h100"))
    table = next(tables)
    last = {name: float(column[-1]) for name, column in table.dims.items()}
    own = shipped("mogul").estimate("moe", last, H100, "fp8")
    assert own.seconds == pytest.approx(table.seconds[-1], rel=0.05)


def test_another_machine_borrows_from_the_engine_asked_for():
    dims = {"rows": 4096.0, "distinct": 64.0, **SHAPE}
    h800 = hardware("h800")
    of = {name: shipped(name).estimate("moe", dims, h800, "bf16") for name in ("vllm", "mogul")}
    assert all("vLLM 0.22.1 kernels" in source for source in of["vllm"].sources)
    assert not any("vLLM" in source for source in of["mogul"].sources)


def test_both_machines_are_shipped_whole():
    """The grid of `calibrate`: products, experts in two formats, decode, prompts; links beside."""
    for device in ("h100", "h200"):
        tables = (read_table(path) for path in SHIPPED_DIR.glob(f"{device}-*.csv"))
        own = [t for t in tables if "without multicast" in t.source]
        sizes = {(t.kind, t.engine, t.dtype): len(t) for t in own}
        assert sizes == {
            ("gemm", "torch", "bf16"): 56, ("gemm", "torch", "fp8"): 56,
            ("moe", "mogul", "bf16"): 32, ("moe", "mogul", "fp8"): 32,
            ("attention_decode", "mogul", "bf16"): 45, ("attention_decode", "torch", "bf16"): 45,
            ("attention_prefill", "torch", "bf16"): 12,
        }  # fmt: skip
        machine = read_machine(SHIPPED_DIR / f"{device}-machine.json")
        assert machine.device == device
        assert machine.skipped == []
        assert {"driver", "torch", "triton", "nccl", "cuda"} <= set(machine.versions)
        assert {(one.name, one.ranks) for one in machine.collectives} >= {
            (name, 2) for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        }


def made(factor, *, engine="x", m=(64.0, 4096.0), **head):
    """A table of square products that take `factor` times what the curve says."""
    dims = {name: np.array(m) for name in ("m", "n", "k")}
    dims |= {"weight_bytes": np.full(len(m), 2.0), "input_bytes": np.full(len(m), 2.0)}
    base = curves.curve("hopper", "gemm").seconds(physics.demand("gemm", dims), H100, "bf16")
    return KernelTable("gemm", "h100", engine, "bf16", f"of {engine}", dims, base * factor, **head)


def ratio_at(size, *tables, engine=""):
    """What the tables make of the curve at a square product."""
    asked = dict.fromkeys(("m", "n", "k"), size) | {"weight_bytes": 2.0, "input_bytes": 2.0}
    plain = curves.curve("hopper", "gemm").seconds(physics.demand("gemm", asked), H100, "bf16")
    return Calibration(tables, engine).estimate("gemm", asked, H100, "bf16").seconds / plain


def test_a_call_measured_again_counts_by_its_newest_time():
    older, newer = made(3.0), made(2.0, m=(64.0,))
    left = without_repeated(older, [newer, made(9.0, engine="y"), made(9.0, is_reference=True)])
    assert left.dims["m"].tolist() == [4096.0]
    assert ratio_at(64.0, left, newer) == pytest.approx(2.0)
    assert ratio_at(4096.0, left, newer) == pytest.approx(3.0, rel=0.02)


def test_an_engine_s_own_table_counts_only_beside_its_calls():
    own, other = made(0.5, engine="own", m=(64.0,)), made(2.0)
    assert ratio_at(64.0, own, other, engine="own") == pytest.approx(0.5)
    assert ratio_at(80.0, own, other, engine="own") == pytest.approx(0.5)
    assert ratio_at(3000.0, own, other, engine="own") == pytest.approx(2.0, rel=0.02)


def test_newer_tables_say_which_row_of_the_ledger_each_time_is():
    paths = sorted(SHIPPED_DIR.glob(f"*{NEWER}.csv"))
    assert paths
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert lines[0].endswith(",seconds,case")
        commits = read_table(path).source.partition("commits ")[2].split(", ")
        assert {line.rstrip('"').rpartition("@")[2] for line in lines[1:]} == set(commits)


@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize("tokens", [8, 64, 456])
def test_rows_in_two_numbers_cost_between_fp8_and_bf16(device, tokens):
    calibration = shipped("mogul")
    spent = {}
    for dtype, width in (("fp8", 1.0), ("fp8-w8a16", 1.0), ("bf16", 2.0)):
        dims = {"rows": 8.0 * tokens, "distinct": 64 * (1 - 0.875**tokens), **SHAPE}
        dims |= {"weight_bytes": width, "input_bytes": width}
        estimate = calibration.estimate("moe", dims, hardware(device), dtype)
        assert estimate.tier == "measured"
        spent[dtype] = estimate.seconds
    assert spent["fp8"] < spent["fp8-w8a16"] < 0.8 * spent["bf16"]


def test_a_measured_machine_keeps_what_its_engine_joins(tmp_path):
    """A calibration measures no joined products: mogul's stay, and are asked first."""
    for path in SHIPPED_DIR.glob("h200-gemm-*-torch.csv"):
        (tmp_path / path.name).write_text(path.read_text())
    h200, dims = hardware("h200"), {"m": 1.0, "n": 5120.0, "k": 5120.0, "input_bytes": 1.0}
    dims["weight_bytes"] = 1.0
    mine = with_measured(tmp_path, "mogul")
    joined = shipped("mogul").estimate("gemm", dims, h200, "fp8")
    assert joined.seconds < 9e-6
    assert mine.estimate("gemm", dims, h200, "fp8") == joined
    assert with_measured(tmp_path).estimate("gemm", dims, h200, "fp8").seconds > joined.seconds
    sources = [
        t.source for t in mine.tables if (t.device, t.engine, t.kind) == ("h200", "torch", "gemm")
    ]
    assert len(sources) == 2  # the machine's own tables, not the shipped ones beside them


def test_a_table_needs_its_head(tmp_path):
    (tmp_path / "t.csv").write_text("# kind = moe\nrows,seconds\n1,2\n")
    with pytest.raises(ValueError, match="lacks device, dtype, engine, source"):
        read_table(tmp_path / "t.csv")


HEAD = "# kind = moe\n# device = h100\n# engine = x\n# dtype = fp8\n# source = s\n"
COLUMNS = "rows,distinct,hidden,width,seconds\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + COLUMNS + "8,8,128,64,1e-5\n8,8,128,64,nan\n", "row 2 .*seconds is 'nan'"),
        (HEAD + COLUMNS + "8,8,128,64,0\n", "row 1 .*seconds is '0'"),
        (HEAD + COLUMNS + "8,8,-128,64,1e-5\n", "row 1 .*hidden is '-128'"),
        (HEAD + COLUMNS + "8,8,128,wide,1e-5\n", "row 1 .*width is 'wide'"),
        (HEAD + COLUMNS + "8,8\n", "row 1 .*hidden is None"),
        (HEAD + "rows,seconds\n8,1e-5\n", "has no column 'distinct', which moe needs"),
        (HEAD.replace("moe", "mow") + COLUMNS + "8,8,128,64,1e-5\n", "unknown kind 'mow'"),
        (HEAD.replace("fp8", "fp9") + COLUMNS + "8,8,128,64,1e-5\n", "unknown dtype 'fp9'"),
    ],
)
def test_a_table_that_cannot_be_is_named(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ArtifactError, match=rf"t\.csv.*{words}"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("text", ["[]", "3", '{"device": "h100", "source": "s", "launch_s": -1}'])
def test_a_machine_that_cannot_be_is_named(tmp_path, text):
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises((ArtifactError, ConfigError), match=r"machine\.json"):
        read_machine(tmp_path)


def test_the_nearer_measurement_weighs_more():
    dims = {name: np.array([64.0, 4096.0]) for name in ("m", "n", "k")}
    dims |= {"weight_bytes": np.array([2.0, 2.0]), "input_bytes": np.array([2.0, 2.0])}
    base = curves.curve("hopper", "gemm").seconds(physics.demand("gemm", dims), H100, "bf16")
    table = KernelTable("gemm", "h100", "x", "bf16", "test", dims, base * [2.0, 1.0])
    asked = {"m": 80.0, "n": 64.0, "k": 64.0, "weight_bytes": 2.0, "input_bytes": 2.0}
    plain = curves.curve("hopper", "gemm").seconds(physics.demand("gemm", asked), H100, "bf16")
    ratio = Calibration((table,)).estimate("gemm", asked, H100, "bf16").seconds / plain
    assert ratio == pytest.approx(2.0, rel=0.05)


def test_no_shipped_time_beats_the_machine():
    """A measured call from memory cannot be faster than the memory, nor any than the arithmetic."""
    for table in load_shipped():
        device = hardware(table.device)
        demand = physics.demand(table.kind, table.dims)
        peak = device.peak(ARITHMETIC.get(table.dtype, table.dtype))
        compute_s = demand.flop / peak
        from_memory = demand.moved_bytes > 4 * device.l2_bytes
        memory_s = np.where(from_memory, demand.moved_bytes / device.memory_bytes_per_s, 0.0)
        worst = (np.maximum(compute_s, memory_s) / table.seconds).max()
        assert worst < 1.02, f"{table.kind} {table.dtype} of {table.engine}: {worst:.2f}"
