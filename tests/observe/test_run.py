"""A calibration pass: data in, a folder out, kills and bad input survived."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mogul.core.errors import ArtifactError, ConfigError, MogulError
from mogul.observe.data import calibration, position_major, read_texts
from mogul.observe.recorder import record_routing
from mogul.observe.run import TraceSettings, run_trace
from mogul.spec.fingerprint import stamp_of_config
from mogul.spec.trace import load_trace


def tiny():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, intermediate_size=24, moe_intermediate_size=12, num_experts=8,
        num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def encode(text):
    return [ord(letter) % 64 for letter in text]


def data(max_tokens=None, length=32):
    sources = {
        "a.jsonl": [("code", "x = 1; " * 20), ("chat", "hello you " * 15)],
        "b.txt": [("b", "words " * 10)],
    }
    return calibration(sources, encode, length=length, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def stamp(model):
    return stamp_of_config(model.config.to_dict(), name="tiny")


def test_windows_hold_every_token_once_and_one_task_each():
    calib = data()
    assert calib.tasks == ("code", "chat", "b")
    assert calib.num_tokens == 140 + 150 + 60
    per_task = [sum(w.num_real for w in calib.windows if w.task == t) for t in range(3)]
    assert per_task == [140, 150, 60]
    assert data(max_tokens=100).num_tokens == 100


def test_position_major_takes_real_tokens_across_sequences():
    assert position_major(np.array([3, 1]), 3).tolist() == [0, 3, 1, 2]


def test_padding_is_not_counted_and_changes_nothing(model, stamp, tmp_path):
    calib = data()
    done = run_trace(model, stamp, calib, tmp_path / "t", TraceSettings(batch=3))
    counts = np.zeros((2, 8), dtype=np.int64)
    with record_routing(model) as recording, torch.no_grad():
        for window in calib.windows:
            recording.clear()
            model(torch.from_numpy(window.ids[: window.num_real])[None])
            for position, ids_TK in enumerate(recording.ids()):
                counts[position] += np.bincount(ids_TK.ravel(), minlength=8)
    np.testing.assert_array_equal(done.trace.count, counts)
    np.testing.assert_array_equal(done.trace.arrays["task_count"].sum(0), counts)
    back = load_trace(tmp_path / "t")
    assert back.meta.is_complete
    assert back.meta.num_tokens == calib.num_tokens
    assert back.meta.tasks == ("code", "chat", "b")
    assert back.meta.data[0].startswith("a.jsonl:")
    assert done.overhead is not None


def test_per_token_files_agree_with_the_counts(model, stamp, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="extra mogul[trace] is not installed")
    settings = TraceSettings(batch=3, per_token=True)
    for _ in range(2):  # a second run replaces the parts of the first
        done = run_trace(model, stamp, data(), tmp_path, settings)
    table = parquet.read_table(tmp_path / "tokens")
    assert done.num_token_rows == table.num_rows == 350
    ids_TK = np.array(table["e1"].to_pylist())
    np.testing.assert_array_equal(np.bincount(ids_TK.ravel(), minlength=8), done.trace.count[1])
    weights = np.array(table["w1"].to_pylist(), dtype=np.float64)
    assert weights.sum() == pytest.approx(done.trace.arrays["weight_sum"][1].sum(), rel=1e-3)
    assert set(table["task"].to_pylist()) == {"code", "chat", "b"}
    first = table.filter(np.array(table["seq"]) == 0)
    assert sorted(first["pos"].to_pylist()) == list(range(first.num_rows))


def test_ids_of_a_token_stay_under_400_bytes(tmp_path):
    pytest.importorskip("pyarrow", reason="extra mogul[trace] is not installed")
    from mogul.observe.tokens import TokenWriter
    from mogul.spec.trace import ModelStamp

    large = ModelStamp(
        name="m", family="qwen3_moe", num_layers=48, num_experts=128, top_k=8, hidden_size=8
    )
    writer = TokenWriter(tmp_path, large, tuple(range(48)), ("all",))
    rng = np.random.default_rng(0)
    zeros = np.zeros(8192, dtype=np.int64)
    writer.add(
        rng.integers(0, 128, (48, 8192, 8)), None, seq=zeros, pos=np.arange(8192),
        token_id=zeros, task=zeros,
    )  # fmt: skip
    writer.finish()
    total = sum(part.stat().st_size for part in (tmp_path / "tokens").iterdir())
    assert total / 8192 <= 400


def test_bad_input_is_named_and_leaves_earlier_results(model, stamp, tmp_path):
    run_trace(model, stamp, data(), tmp_path / "t", TraceSettings(measure_overhead=False))
    before = sorted((f.name, f.read_bytes()) for f in (tmp_path / "t").iterdir())
    broken = tiny()
    with torch.no_grad():
        broken.model.layers[1].mlp.gate.weight[3, 2] = float("nan")
    with pytest.raises(MogulError, match=r"routers of the layers \[1\]"):
        run_trace(broken, stamp, data(), tmp_path / "t", TraceSettings(save_every_s=0))
    with pytest.raises(ConfigError, match="holds no tokens"):
        run_trace(model, stamp, calibration({}, encode, length=8), tmp_path / "t", TraceSettings())
    assert sorted((f.name, f.read_bytes()) for f in (tmp_path / "t").iterdir()) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("dear")
    with pytest.raises(ArtifactError, match="exists and is no trace"):
        run_trace(model, stamp, data(), tmp_path / "other", TraceSettings())


def test_bad_data_files_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    with pytest.raises(ArtifactError, match="cannot read"):
        read_texts(file)
    file.write_text("")
    with pytest.raises(ArtifactError, match="holds no text"):
        read_texts(file)
    file.write_text('{"text": "x"}\n{"words": 1}\n')
    with pytest.raises(ArtifactError, match="line 2 has no text"):
        read_texts(file)
    file.write_text('{"text": "x"\n')
    with pytest.raises(ArtifactError, match="line 1 is no JSON"):
        read_texts(file)
    file.write_text('{"text": "x", "task": "t"}\n\n{"messages": [{"content": "y"}]}\n')
    assert read_texts(file) == [("t", "x"), ("a", "y")]
    file.write_text('{"messages": ["hi"]}\n')
    with pytest.raises(ArtifactError, match="line 1 has no text"):
        read_texts(file)
    file.write_text('{"text": "two\u2028lines"}\n', encoding="utf-8")
    assert read_texts(file) == [("a", "two\u2028lines")]


_ENDLESS = """
import torch
from torch import nn
from mogul.observe.data import calibration
from mogul.observe.run import TraceSettings, run_trace
from mogul.spec.fingerprint import stamp_of_config

class ToyRouter(nn.Linear):
    pass

class ToyExperts(nn.Module):
    def forward(self, x, ids, weights):
        return x

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = ToyRouter(4, 8), ToyExperts()

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)

class Config:
    def to_dict(self):
        return {{
            "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8,
            "moe_intermediate_size": 4, "num_experts": 8, "num_experts_per_tok": 2,
        }}

class Toy(nn.Module):
    config = Config()

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(64, 4), nn.ModuleList([Block()])

    def forward(self, input_ids, use_cache=False):
        return self.layers[0](self.embed(input_ids).flatten(0, 1))

toy = Toy()
encode = lambda text: [ord(c) % 64 for c in text]
calib = calibration({{"a": [("a", "hello you " * 50)]}}, encode, length=32)

class Endless(type(calib)):
    def batches(self, size):
        while True:
            yield from super().batches(size)

endless = Endless(calib.windows, calib.tasks, calib.names)
stamp = stamp_of_config(Config().to_dict(), name="toy")
run_trace(toy, stamp, endless, {out!r}, TraceSettings(save_every_s=0.0, measure_overhead=False))
"""


def test_a_killed_run_leaves_a_whole_trace(tmp_path):
    out = tmp_path / "t"
    code = _ENDLESS.format(out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (out / "trace.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    trace = load_trace(out)
    assert not trace.meta.is_complete
    assert trace.meta.num_tokens > 0
    assert trace.count[0].sum() == 2 * trace.meta.num_tokens
    assert json.loads((out / "trace.json").read_text())["is_complete"] is False
