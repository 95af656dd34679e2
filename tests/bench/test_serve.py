"""Measuring the engine: times from token times by hand, the floor by hand, a whole run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mogul.bench import serve, serve_floor, serve_report
from mogul.bench.serve_load import FORCED_TEMPERATURE, Timeline, Workload
from mogul.cli.bench_serve import engine_options
from mogul.cli.main import main
from mogul.core.errors import ConfigError
from mogul.models.input_stats import measure_stats
from mogul.serve.kv_scales import KvScales

CONFIG = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.3,
    "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).eval()


def test_times_are_told_from_token_times() -> None:
    line = Timeline((0.0, 0.5), ((1.0, 2.0, 4.0), (3.0, 3.5, 6.0)), input_tokens=10)
    assert line.ttft_s().tolist() == [1.0, 2.5]
    assert line.tpot_s().tolist() == [1.5, 1.5]
    assert line.itl_s().tolist() == [1.0, 2.0, 0.5, 2.5]
    assert line.output_per_s == 1.0
    assert line.prefill_per_s == pytest.approx(20 / 3)
    # From 3.0 (last first token) to 4.0 (first last token) each of the two gained one token.
    assert line.decode_s == 1.0
    assert Timeline((0.0, 0.0), ((1.0, 2.0), (3.0, 4.0)), 1).decode_s is None
    # Steps that decode end at 2.0, 3.5, 4.0 and 6.0, each for one of the two.
    assert line.decoding == 1.0
    assert Timeline((0.0, 0.0), ((1.0, 2.0, 3.0), (1.5, 3.0, 3.0)), 1).decoding == 1.5


def test_a_poisson_load_arrives_at_its_rate() -> None:
    arrivals = Workload(4000, 8, 8, rate=50.0).arrivals_s()
    assert arrivals[0] == 0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(80, rel=0.1)
    assert Workload(3, 8, 8).arrivals_s() == [0.0] * 3


def test_prompts_differ_from_the_first_token() -> None:
    prompts = Workload(90, 5, 2).prompts(97)
    assert len({prompt[0] for prompt in prompts}) == 90
    assert all(0 <= token < 97 for prompt in prompts for token in prompt)
    assert Workload(90, 5, 2, seed=1).prompts(97) != prompts


def test_requests_draw_numbers_of_their_own() -> None:
    seeds = [one.seed for run in (0, 1) for one in Workload(5, 3, 2, seed=run).params()]
    assert len(set(seeds)) == 10


def test_forced_tokens_pick_nearly_all_experts(model: Qwen3MoeForCausalLM) -> None:
    options = {"page_size": 4, "cache_tokens": 900, "record_experts": True}
    workload = Workload(16, 4, 8, temperature=FORCED_TEMPERATURE)
    engine = serve._engine(model, serve.Request((workload,), engine=options))
    found = serve_floor.count_distinct(engine, workload)
    assert found is not None
    assert found > 0.8 * serve_floor.weights_of(model).uniform_distinct(16)


@pytest.mark.parametrize(
    ("values", "words"),
    [((0, 1, 2), "no time per token"), ((1, 1, 1), "no time per token"), ((1, 1, 2, -1), "arrive")],
)
def test_loads_without_a_time_are_refused(values: tuple, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Workload(*values)


def test_bytes_of_a_step_by_hand(model: Qwen3MoeForCausalLM) -> None:
    weights = serve_floor.weights_of(model)
    expert = 3 * 32 * 16 * 4
    assert weights.expert_bytes == (expert, expert)
    everything = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert weights.dense_bytes == everything - 2 * 8 * expert - 97 * 32 * 4
    assert weights.uniform_distinct(1) == 2
    assert weights.uniform_distinct(1000) == pytest.approx(8)
    workload = Workload(4, 10, 6)
    step = serve.step_bytes(weights, workload, 4, 3.0, token_bytes=100)
    assert step == weights.dense_bytes + 3 * 2 * expert + 4 * 13 * 100


def test_shared_embeddings_are_read_as_the_head() -> None:
    tied = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**CONFIG, "tie_word_embeddings": True}))
    apart = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    assert serve_floor.weights_of(tied).dense_bytes == serve_floor.weights_of(apart).dense_bytes


def test_a_run_measures_every_load(model: Qwen3MoeForCausalLM) -> None:
    loads = (Workload(1, 12, 6), Workload(3, 12, 6), Workload(6, 12, 6, rate=200.0))
    request = serve.Request(loads, runs=2, engine={"page_size": 4, "cache_tokens": 400})
    result = serve.measure(model, request, name="tiny")
    assert [len(cell.runs) for cell in result.cells] == [2, 2, 2]
    for cell in result.cells:
        assert cell.distinct is not None
        assert 2 <= cell.distinct <= 8
        assert cell.floor_s > 0
        assert all(len(times) == 6 for run in cell.runs for times in run.tokens_s)
        assert (torch.tensor([list(t) for t in cell.runs[0].tokens_s]).diff() > 0).all()
    assert result.cells[1].decode_s is not None
    assert result.cells[0].distinct == 2
    shown = serve_report.table(result)
    assert [row[0] for row in shown.rows] == ["batch 1", "batch 3", "200/s x 6"]
    rows = serve_report.ledger_rows(result)
    assert [row["metric"] for row in rows] == [
        "decode step", "prefill speed", "decode step", "prefill speed", "time to first token",
    ]  # fmt: skip
    assert all(row["value"] > 0 for row in rows)
    for row in (rows[0], rows[2], rows[4]):
        for what in ("ttft_ms", "tpot_ms", "itl_ms"):
            assert 0 < row[what]["p50"] <= row[what]["p95"] <= row[what]["p99"]
        assert row["ratio"] > 0
        assert row["output_per_s"] > 0
    opened = result.cells[2]
    assert 1 <= opened.decoding <= 6
    assert rows[4]["decoding"] == round(opened.decoding, 2)
    assert opened.decode_s == opened.percentile("itl_s", 50)
    assert opened.distinct is not None
    assert opened.distinct <= opened.uniform * 1.5
    assert any("decode together" in note for note in shown.notes)


def test_more_requests_than_sequences_are_counted_as_they_run(model: Qwen3MoeForCausalLM) -> None:
    loads = (Workload(9, 12, 6, rate=500.0), Workload(9, 12, 6))
    options = {"page_size": 4, "cache_tokens": 400, "max_sequences": 3}
    cells = serve.measure(model, serve.Request(loads, runs=1, engine=options), name="tiny").cells
    weights = serve_floor.weights_of(model)
    for cell in cells:
        assert cell.distinct is not None
        assert cell.decoding <= 3
        assert cell.uniform == weights.uniform_distinct(cell.decoding)
    assert cells[1].decoding == 3


def test_guesses_are_told_by_position(model: Qwen3MoeForCausalLM) -> None:
    loads = (Workload(2, 12, 24),)
    options = {"page_size": 4, "cache_tokens": 400}
    request = serve.Request(loads, runs=1, engine=options, guess="ngram", guesses=2)
    result = serve.measure(model, request, name="tiny")
    assert len(result.cells[0].acceptance) == 2
    assert any("guesses that stood" in note for note in serve_report.table(result).notes)


def test_alike_tokens_are_replaced_by_random_ones(model: Qwen3MoeForCausalLM, monkeypatch) -> None:
    counts = iter([2.0, 7.5])
    monkeypatch.setattr(serve, "count_distinct", lambda engine, workload: next(counts))
    workloads, distinct = serve._spread(
        model,
        serve_floor.weights_of(model),
        serve.Request((Workload(30, 4, 4),), engine={"cache_tokens": 400}),
    )
    assert workloads[0].temperature == FORCED_TEMPERATURE
    assert distinct == [7.5]


def test_options_of_the_engine_are_pairs() -> None:
    found = engine_options(("kv_dtype=fp8", "page_size=64", "graphs=false"))
    assert found == {"kv_dtype": "fp8", "page_size": 64, "graphs": False}
    with pytest.raises(ConfigError, match="no option 'page_sise'") as caught:
        engine_options(("page_sise=1",))
    assert caught.value.__notes__ == ["fix: did you mean 'page_size'?"]
    with pytest.raises(ConfigError, match="not NAME=VALUE"):
        engine_options(("graphs",))


def test_the_verb_prints_and_records(tmp_path, capsys) -> None:
    config = tmp_path / "config.json"
    kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    config.write_text(json.dumps({**CONFIG, **kind}))
    ledger = tmp_path / "ledger.jsonl"
    words = ["bench", "serve", str(config), "--load", "random", "--batch", "2", "--input", "8"]
    words += ["--output", "4", "--runs", "1", "--dtype", "fp32", "--device", "cpu"]
    words += ["--set", "cache_tokens=200", "--record-to", str(ledger), "--format", "json"]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"][0]["load"] == "batch 2"
    assert len(ledger.read_text().splitlines()) == 2
    assert main(["bench", "serve", str(config)]) == 2
    assert "add --load random" in capsys.readouterr().err


def test_scales_of_a_checkpoint_reach_the_engine(tmp_path, monkeypatch, model) -> None:
    model.save_pretrained(tmp_path)
    one = tuple(torch.tensor([float(2 + layer)]) for layer in range(len(model.model.layers)))
    KvScales(one, tuple(scale.clone() for scale in one)).save(tmp_path)
    seen: list[KvScales | None] = []
    whole = serve._engine

    def note(model, request, *args, **more):
        seen.append(request.kv_scales)
        return whole(model, request, *args, **more)

    monkeypatch.setattr(serve, "_engine", note)
    options = {"cache_tokens": 400, "kv_dtype": "fp8"}
    request = serve.Request((Workload(2, input_tokens=8, output_tokens=4),), 1, False, options)
    serve.open_and_measure(str(tmp_path), request, device="cpu")
    assert seen
    assert all(scales is not None and scales.keys[0].tolist() == [2.0] for scales in seen)
    seen.clear()
    options["kv_dtype"] = "auto"
    serve.open_and_measure(str(tmp_path), request, device="cpu")
    assert not any(seen)


def test_statistics_of_another_folder_are_used(tmp_path, capsys, model) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "measured"
    model.save_pretrained(folder)
    elsewhere.mkdir()
    batches = [torch.arange(40).remainder(model.config.vocab_size)[None]]
    measure_stats(model, batches, checkpoint=folder).save(elsewhere)
    words = ["bench", "serve", str(folder), "--batch", "1", "--input", "8", "--output", "3"]
    words += ["--runs", "1", "--device", "cpu", "--set", "cache_tokens=200"]
    words += ["--quantise", "fp8-experts", "--statistics"]
    assert main([*words, str(elsewhere)]) == 0
    assert "rounding by the inputs of 40 tokens" in capsys.readouterr().err
    assert main([*words, str(tmp_path)]) != 0
    assert "input_stats.safetensors" in capsys.readouterr().err


def test_what_cannot_be_served_is_refused(capsys) -> None:
    words = ["bench", "serve", "nano", "--batch", "1", "--runs", "1", "--device", "cpu"]
    for more, told in (
        (["--input", "1000", "--output", "100"], "1100 tokens exceed the 1024"),
        (["--input", "8", "--set", "page_size=many"], "page_size 'many' is no number"),
    ):
        assert main([*words, *more]) == 2
        assert told in capsys.readouterr().err
