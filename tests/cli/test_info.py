"""`mogul info` tells the truth about presets, configs, folders and hub ids."""

import csv
import io
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mogul.cli.main import main
from mogul.spec import presets
from mogul.spec.families import model_spec

TINY = {
    "model_type": "qwen3_moe", "vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 3, "router_n_groups": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def info(capsys, *args: str) -> str:
    assert main(["info", *args]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def failure(capsys, *args: str) -> tuple[int, str]:
    code = main(["info", *args])
    shown = capsys.readouterr()
    assert shown.out == ""
    return code, shown.err


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    tensors = {
        "model.embed_tokens.weight": np.zeros((7, 4), np.float32),
        "model.layers.0.mlp.gate.weight": np.zeros((4, 4), np.float32),
        "model.layers.0.mlp.experts.0.up_proj.weight": np.zeros((3, 4), np.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_the_table_for_people(capsys):
    out = info(capsys, "preset:pangu-pro-moe-72b")
    for words in (
        "71,988,781,056", "16,498,134,016", "71.99 B", "16.50 B", "196,608 bytes",
        "8 groups of 8, 1 of each picked", "134.09 GiB", "yes, by construction",
        "no, the router decides", "source: arXiv 2505.21411",
    ):  # fmt: skip
        assert words in out


def test_json_is_in_base_units(capsys):
    facts = json.loads(info(capsys, "preset:pangu-pro-moe-72b", "--format", "json"))
    assert facts["params"] == 71_988_781_056
    assert facts["active_params"] == 16_498_134_016
    assert facts["kv_bytes_per_token"] == {"bf16": 196_608, "fp8": 98_304}
    assert facts["weight_bytes"]["int4"] == 71_988_781_056 // 2
    assert facts["expert_bytes_per_layer"]["bf16"] == 2 * 1_321_205_760
    assert facts["balanced_devices"] == [1, 2, 4, 8]
    judged = {row["devices"]: row for row in facts["devices"]}
    assert [d for d, row in judged.items() if row["balanced_by_construction"]] == [1, 2, 4, 8]
    assert judged[8]["imbalance_score_uniform_64_tokens"] == 0
    assert judged[16]["imbalance_score_uniform_64_tokens"] > 0.1


def test_ungrouped_imbalance_is_near_the_published_simulation(capsys):
    # 64 experts, 8 picks, 8 devices, 64 tokens: mean 0.335 in 20,000 draws
    facts = json.loads(info(capsys, "preset:olmoe-1b-7b", "--format", "json"))
    eight = next(row for row in facts["devices"] if row["devices"] == 8)
    assert eight["imbalance_score_uniform_64_tokens"] == pytest.approx(0.335, abs=0.03)
    assert not eight["balanced_by_construction"]


def test_csv_holds_the_same_numbers(capsys):
    rows = dict(csv.reader(io.StringIO(info(capsys, "preset:mixtral-8x7b", "--format", "csv"))))
    assert int(rows["params"]) == 46_702_792_704
    assert int(rows["moe.grouping.num_experts"]) == 8
    assert int(rows["weight_bytes.bf16"]) == 2 * 46_702_792_704


def test_a_dense_model_has_no_device_table(capsys):
    out = info(capsys, "preset:smollm2-135m")
    assert "134,515,008" in out
    assert "Expert parallelism" not in out
    assert "experts of one layer" not in out


def test_other_device_counts_may_be_asked_for(capsys):
    args = ("preset:qwen3-30b-a3b", "--devices", "3", "16")
    judged = json.loads(info(capsys, *args, "--format", "json"))["devices"]
    assert [(row["devices"], row["experts_per_device"]) for row in judged] == [(3, None), (16, 8)]
    assert "no, experts do not divide" in info(capsys, *args)
    code, told = failure(capsys, "preset:qwen3-30b-a3b", "--devices", "0")
    assert code == 2
    assert "--devices 0 is no number of devices" in told


def test_the_list_of_presets(capsys):
    out = info(capsys, "preset:")
    assert all(f"preset:{name}" in out for name in presets.names())
    listed = json.loads(info(capsys, "preset:", "--format", "json"))["presets"]
    assert {row["preset"] for row in listed} == set(presets.names())
    assert all(row["source"] for row in listed)


def test_notes_tell_what_is_not_counted(capsys):
    assert "the text decoder alone" in info(capsys, "preset:intern-s1-pro")
    assert "1 multi-token-prediction layer(s)" in info(capsys, "preset:deepseek-v3")


def test_a_config_file(capsys, folder):
    facts = json.loads(info(capsys, str(folder / "config.json"), "--format", "json"))
    assert facts["params"] == model_spec(TINY).params()
    assert "on_disk" not in facts


def test_a_folder_is_read_with_its_files(capsys, folder):
    facts = json.loads(info(capsys, str(folder), "--format", "json"))
    assert facts["on_disk"]["bytes"] == 7 * 4 * 4 + 16 * 4 + 12 * 2
    assert facts["on_disk"]["bytes_by_part"] == {
        "input embedding": 112, "routers": 64, "routed experts": 24,
    }  # fmt: skip
    assert facts["on_disk"]["bytes_by_dtype"] == {"F32": 176, "F16": 24}
    assert "3 tensors" in info(capsys, str(folder))


def test_a_cut_off_file_is_named(capsys, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, told = failure(capsys, str(folder))
    assert code == 1
    assert "model.safetensors has" in told
    assert "fix: it was cut off" in told


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("{", 1, "not valid JSON"),
        ("[]", 1, "holds no JSON object"),
        ('{"model_type": "bert"}', 2, "unknown model_type 'bert'"),
        ('{"model_type": "mixtral"}', 2, "lacks 'vocab_size', 'hidden_size'"),
    ],
)
def test_bad_configs_are_refused_by_words(capsys, tmp_path, content, code, words):
    (tmp_path / "config.json").write_text(content)
    got, told = failure(capsys, str(tmp_path))
    assert got == code
    assert words in told


def test_what_does_not_exist_is_told(capsys, tmp_path):
    assert "config.json does not exist" in failure(capsys, str(tmp_path))[1]
    code, told = failure(capsys, "no-such-model")
    assert code == 1
    assert "is no folder, file, preset or hub id" in told
    assert "fix: give a checkpoint folder" in told
    _, told = failure(capsys, "qwen3-30b-a3")
    assert "fix: did you mean 'preset:qwen3-30b-a3b'" in told
    code, told = failure(capsys, "preset:mixtral-8x7")
    assert code == 2
    assert "fix: did you mean 'mixtral-8x7b'?" in told


def test_a_hub_id_is_taken_from_the_cache(capsys, monkeypatch, folder):
    hub = pytest.importorskip("huggingface_hub")
    path = str(folder / "config.json")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: path)
    facts = json.loads(info(capsys, "some/model", "--format", "json"))
    assert facts["model"] == "some/model"
    assert facts["params"] == model_spec(TINY).params()


def test_a_hub_out_of_reach_is_a_clear_error(capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    code, told = failure(capsys, "some/model")
    assert code == 1
    assert "the hub did not give its config: HF_HUB_OFFLINE is set" in told
    assert "fix: check the name and the network" in told
