"""Calibration: the calls compute what they claim, tables and machine.json come back."""

import json

import pytest

torch = pytest.importorskip("torch")

from mogul.bench import calibrate as bench  # noqa: E402
from mogul.bench import calibrate_cases as cases  # noqa: E402
from mogul.bench.calibrate_links import group_sizes  # noqa: E402
from mogul.core.errors import ArtifactError, ConfigError  # noqa: E402
from mogul.kernels import dequantise_experts, moe_forward  # noqa: E402
from mogul.simulate.calibration import with_measured  # noqa: E402
from mogul.simulate.machine import Machine, read_machine  # noqa: E402
from mogul.simulate.measurements import read_table  # noqa: E402
from mogul.spec.hardware import hardware  # noqa: E402

CPU = torch.device("cpu")


def test_pages_and_plain_attention_have_the_same_dimensions():
    torch.manual_seed(0)
    plain = cases.decode(3, 40, 4, 2, CPU, "fp32")
    paged = cases.decode_on_pages(3, 40, 4, 2, CPU, "fp32")
    assert plain.dims == paged.dims
    assert plain.call(0).squeeze(2).shape == paged.call(0).shape


def test_eight_bit_experts_match_the_plain_ones():
    torch.manual_seed(0)
    case = cases.experts_fp8(16, (64, 32, 8, 2), CPU)
    cells = dict(zip(case.call.__code__.co_freevars, case.call.__closure__, strict=True))
    layer = cells["layers"].cell_contents[0]
    routed, x = cells["routed"].cell_contents, cells["x"].cell_contents
    up, down = dequantise_experts(layer, torch.float32)
    wanted = moe_forward(x.float(), up, down, routed.ids(0), routed.weights)
    got = case.call(0)
    assert (got - wanted).abs().max() < 0.08 * wanted.abs().max()
    assert case.dims["rows"] == 32


def test_picks_rotate_through_more_than_a_cache():
    """One token of a large layer touches 3 MiB: repeated picks would be read from the cache."""
    case = cases.experts(1, (512, 128, 64, 8), CPU, "bf16")
    routed = dict(zip(case.call.__code__.co_freevars, case.call.__closure__, strict=True))
    sets = routed["routed"].cell_contents.sets
    assert case.copies == len(sets) == cases.MOST_COPIES
    assert len({tuple(sorted(ids.flatten().tolist())) for ids in sets}) > 60
    assert case.dims["distinct"] == 8


def test_decode_runs_over_fp8_pages_too():
    """A cache in 8 bits holds half the bytes and rounds the same answer."""
    plain, rounded = (cases.decode_on_pages(2, 32, 4, 2, CPU, "fp32", fp8) for fp8 in (False, True))
    assert (plain.dtype, rounded.dtype) == ("fp32", "fp8")
    assert (plain.dims["kv_bytes"], rounded.dims["kv_bytes"]) == (4, 1)
    assert rounded.call(0).isfinite().all()


def test_groups_of_links():
    assert [group_sizes(n) for n in (2, 3, 4, 6, 8)] == [[2], [3], [2, 4], [2, 6], [2, 4, 8]]


def test_what_cannot_run_is_named_and_the_rest_is_kept(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel here")

    monkeypatch.setattr(cases, "experts", broken)
    paths = bench.calibrate(tmp_path, "cpu-avx512", bench.SMALL, "fp32")
    machine = read_machine(tmp_path)
    assert machine.skipped == ["RuntimeError: no such kernel here"]
    assert machine.versions["torch"] == torch.__version__
    kinds = {read_table(path).kind for path in paths if path.suffix == ".csv"}
    assert kinds == {"gemm", "attention_prefill", "attention_decode"}


def test_a_spent_budget_stops(tmp_path):
    grid = cases.Grid(tokens=(1,), products=((8, 8),), experts=(), contexts=(), budget_s=-1)
    paths = bench.calibrate(tmp_path, "cpu-avx512", grid, "fp32")
    assert [path.name for path in paths] == ["machine.json"]
    assert "1 calls" in read_machine(tmp_path).skipped[0]


def test_machine_json_changes_launches_and_collectives(tmp_path):
    found = Machine(
        device="h100",
        source="test",
        launch_s=1e-6,
        collectives=[
            {"name": "all_reduce", "ranks": 2, "bytes": size, "s": size * 1e-11}
            for size in (4096, 1 << 20)
        ],
    )
    (tmp_path / "machine.json").write_text(found.model_dump_json())
    machine = read_machine(tmp_path / "machine.json")
    assert machine.applied(hardware("h100")).launch_s == 1e-6
    tables = machine.collective_tables()
    assert tables.seconds("h100", "all_reduce", 2, 65536) == pytest.approx(65536e-11)
    assert tables.seconds("h100", "all_reduce", 4, 65536) is None


def test_broken_machine_files_are_named(tmp_path):
    path = tmp_path / "machine.json"
    with pytest.raises(ArtifactError, match=r"no machine\.json"):
        read_machine(tmp_path)
    path.write_text('{"device": "h1')
    with pytest.raises(ArtifactError, match=r"no machine\.json"):
        read_machine(path)
    path.write_text(json.dumps({"device": "h100", "source": "x", "lanuch_s": 1}))
    with pytest.raises(ConfigError, match="lanuch_s"):
        read_machine(path)


def test_own_tables_push_shipped_ones_aside(tmp_path):
    head = "# kind = moe\n# device = h100\n# engine = vllm\n# dtype = bf16\n# source = mine\n"
    row = "rows,distinct,hidden,width,seconds\n8,8,5120,1344,0.5\n"
    (tmp_path / "t.csv").write_text(head + row)
    mine = with_measured(tmp_path)
    key = ("moe", "h100", "bf16")
    assert [t.source for t in mine.tables if (t.kind, t.device, t.dtype) == key] == ["mine"]
