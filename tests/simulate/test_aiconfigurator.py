"""The importer of AIConfigurator's tables, on files of its form made here."""

import sys

import numpy as np
import pytest

from mogul.core.errors import ArtifactError
from mogul.simulate import aiconfigurator

MOE = {
    "moe_dtype": ["bfloat16", "bfloat16", "fp8_block", "unheard-of"],
    "distribution": ["balanced", "power_law_1.2", "balanced", "balanced"],
    "num_tokens": [64, 64, 2, 64], "topk": [8] * 4, "num_experts": [128] * 4,
    "moe_ep_size": [4] * 4, "moe_tp_size": [2] * 4, "hidden_size": [2048] * 4,
    "inter_size": [768] * 4, "latency": [0.5, 9.0, 0.2, 1.0],
}  # fmt: skip
NCCL = {
    "nccl_dtype": ["half"] * 4, "op_name": ["all_gather", "all_gather", "alltoall", "all_gather"],
    "num_gpus": [8, 8, 8, 8], "message_size": [2**20, 2**10, 2**20, 2**21],
    "latency": [0.02, 0.01, 0.03, 0.05], "kernel_source": ["NCCL"] * 3 + ["NCCL eager"],
}  # fmt: skip


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(room, engine, version, file, columns):
        folder = tmp_path / "aiconfigurator_core/systems/data/h100_sxm" / room / engine / version
        folder.mkdir(parents=True)
        parquet.write_table(pa.table(columns), folder / file)

    write("moe", "vllm", "0.9.0", "moe_perf.parquet", MOE | {"latency": [7.0] * 4})
    write("moe", "vllm", "0.24.0", "moe_perf.parquet", MOE)
    write("comm", "nccl", "2.29.2", "nccl_perf.parquet", NCCL)
    (tmp_path / "aiconfigurator_core" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "aiconfigurator_core", raising=False)


@pytest.mark.usefixtures("wheel")
def test_rows_and_experts_of_one_rank():
    found = {table.dtype: table for table in aiconfigurator.tables("h100", "vllm")}
    assert set(found) == {"bf16", "fp8_block"}
    plain = found["bf16"]
    assert len(plain) == 1  # the skewed row is left out
    assert plain.seconds[0] == pytest.approx(0.5e-3)  # the newest version, in seconds
    assert "vllm/0.24.0/moe_perf.parquet" in plain.source
    dims = {name: float(column[0]) for name, column in plain.dims.items()}
    assert (dims["rows"], dims["distinct"], dims["width"]) == (128, 32, 384)
    assert (dims["weight_bytes"], dims["input_bytes"]) == (2, 2)
    assert float(found["fp8_block"].dims["distinct"][0]) == 4  # fewer rows than experts


@pytest.mark.usefixtures("wheel")
def test_collectives_count_bytes_of_captured_calls():
    tables = aiconfigurator.collective_tables("h100", "vllm")
    assert set(tables.curves) == {("h100", "all_gather", 8), ("h100", "all_to_all", 8)}
    sizes, seconds = tables.curves["h100", "all_gather", 8]
    np.testing.assert_allclose(sizes, [2**11, 2**21])
    np.testing.assert_allclose(seconds, [1e-5, 2e-5])


def test_without_the_wheel_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aiconfigurator, "wheel_dir", lambda: None)
    with pytest.raises(ArtifactError, match="not installed") as caught:
        aiconfigurator.tables("h100", "vllm")
    assert "aiconfigurator-core==0.12.0" in "".join(caught.value.__notes__)
