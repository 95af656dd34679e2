"""trace, report, place and regroup end to end on a tiny checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from mogul.cli.main import main
from mogul.spec.placement import load_placement
from mogul.spec.trace import load_trace

TEXT = "It is a truth universally acknowledged, that experts in possession of rows want balance. "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=130, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, intermediate_size=24, moe_intermediate_size=8, num_experts=8,
        num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate.weight" in name:
                parameter.normal_(0, 1)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)} | {"?u": 128}, "?u"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?u").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    lines = [{"text": TEXT * 8, "task": "prose"}, {"text": "def f(x): return x * 2\n" * 30}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture(scope="module")
def trace(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("traces") / "trace"
    args = ["trace", str(checkpoint), "--data", str(data), "--out", str(out), "--length", "64"]
    assert main([*args, "--device", "cpu"]) == 0
    return out


def test_trace_holds_the_data(trace, checkpoint):
    found = load_trace(trace)
    assert found.meta.num_tokens == len(TEXT) * 8 + len("def f(x): return x * 2\n") * 30
    assert found.meta.tasks == ("prose", "text")
    assert found.meta.model.name == str(checkpoint)


def test_merge_of_two_traces(trace, tmp_path, capsys):
    assert main(["trace", "--merge", str(trace), str(trace), "--out", str(tmp_path / "two")]) == 0
    assert (load_trace(tmp_path / "two").count == 2 * load_trace(trace).count).all()
    assert main(["trace", "--merge", str(trace), "--out", str(trace)]) == 2
    assert "is one of the traces" in capsys.readouterr().err


def test_report_prints_and_writes_one_page(trace, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(trace), "--devices", "2", "4", "--html", str(page)]) == 0
    assert "busiest expert / mean rows" in capsys.readouterr().out
    html = page.read_text()
    for title in ("Load of every expert", "Co-activation", "Specialisation by task", "rho placed"):
        assert title in html
    assert 'src="http' not in html
    assert json.loads(page.with_suffix(".json").read_text())["layers"]["layer"] == [0, 1]
    assert main(["report", str(trace), "--no-html", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]["rows"]


def test_report_compares_two_traces(trace, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(trace), str(trace), "--html", str(page)]) == 0
    assert "distance of the loads, 0..1" in capsys.readouterr().out
    assert "Distance of the expert loads" in page.read_text()


def test_place_writes_exports_and_applies(trace, checkpoint, tmp_path, capsys):
    from mogul.models.load import load_model

    target = tmp_path / "p.json"
    args = ["place", str(trace), "--devices", "2", "--placement", str(target)]
    extra = ["--export", "sglang", "--export-out", str(tmp_path / "s.json")]
    assert main([*args, *extra, "--apply", str(checkpoint), "--out", str(tmp_path / "m")]) == 0
    placed = load_placement(target)
    assert all(one.rho <= one.rho_before for one in placed.layers)
    rows = json.loads((tmp_path / "s.json").read_text())["physical_to_logical_map"]
    assert rows == [list(one.expert_of_slot) for one in placed.layers]
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        before, after = (load_model(f)(ids).logits for f in (checkpoint, tmp_path / "m"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main([*args[:3], "9"]) == 0  # one slot each, one device empty
    assert main([*args[:3], "4", "--slots", "1"]) == 2
    assert "4 devices with 1 slots cannot hold 8 experts" in capsys.readouterr().err


def test_regroup_writes_a_moge_and_says_what_it_cost(trace, checkpoint, data, tmp_path, capsys):
    from mogul.models.load import load_model

    out = tmp_path / "moge"
    args = ["regroup", str(checkpoint), "--trace", str(trace), "--devices", "2"]
    more = ["--groups", "4", "--data", str(data), "--length", "32", "--heal", "2"]
    assert main([*args, *more, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "kept picks, random groups",
        "kept routing mass",
        "KL to the original",
        "rho now",
    ):
        assert words in printed
    assert load_model(out).config.router_n_groups == 4
    assert (out / "tokenizer.json").exists()
    assert main([*args, *more, "--out", str(out), "--device", "cpu"]) == 2  # not without --force
    assert "exists and is not empty" in capsys.readouterr().err


def test_regroup_streams_and_report_takes_a_placement(trace, checkpoint, tmp_path, capsys):
    from mogul.models.load import load_model

    out = tmp_path / "streamed"
    args = ["regroup", str(checkpoint), "--trace", str(trace), "--devices", "2", "--stream"]
    assert main([*args, "--out", str(out)]) == 0
    assert "random groups" in capsys.readouterr().out
    assert load_model(out).config.router_n_groups == 2
    assert (out / "tokenizer.json").exists()
    assert main([*args, "--heal", "3", "--out", str(tmp_path / "no")]) == 2
    assert "--stream loads no model" in capsys.readouterr().err
    file = tmp_path / "placement.json"
    place = ["place", str(trace), "--devices", "4", "--method", "contiguous"]
    assert main([*place, "--placement", str(file)]) == 0
    page = tmp_path / "page.html"
    shown = ["report", str(trace), "--placement", str(file), "--html", str(page)]
    assert main(shown) == 0
    assert "Transitions from layer to layer" in page.read_text()


def test_tokens_of_another_vocabulary_are_refused(checkpoint, trace, tmp_path, capsys):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    names = json.loads((other / "tokenizer.json").read_text())
    names["model"]["vocab"]["?u"] = 130
    (other / "tokenizer.json").write_text(json.dumps(names))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4 + "\u00e4")  # no letter that it knows
    for args in (
        ["trace", str(other), "--data", str(text), "--out", str(tmp_path / "t")],
        ["calibrate", str(other), "--data", str(text), "--out", str(tmp_path / "t")],
        ["regroup", str(other), "--trace", str(trace), "--devices", "2", "--length", "32",
         "--data", str(text), "--out", str(tmp_path / "t")],
    ):  # fmt: skip
        assert main(args) == 2
        assert "gave token 130, the model knows 0..129" in capsys.readouterr().err
        assert not (tmp_path / "t").exists()


def test_a_training_run_names_its_trace(trace, tmp_path, capsys):
    import shutil

    shutil.copytree(trace, tmp_path / "trace")
    assert main(["report", str(tmp_path)]) == 1
    assert f"fix: give {tmp_path / 'trace'}" in capsys.readouterr().err


def test_bad_input_is_named(trace, checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for args, words in (
        (["trace", "--out", str(tmp_path / "t")], "give a model to trace"),
        (["trace", str(checkpoint), "--data", str(empty), "--out", str(tmp_path / "t")], "no text"),
        (["trace", str(checkpoint), "--batch", "0", "--out", str(tmp_path / "t")], "0 sequences"),
        (["trace", str(checkpoint), "--device", "mars", "--out", str(tmp_path / "t")],
         "device 'mars' is unknown"),
        (["report", str(tmp_path)], "holds no trace"),
        (["report", str(trace), "--devices", "2", "0"], "8 experts do not stand on 0 devices"),
        (["report", str(trace), "--devices", "9"], "8 experts do not stand on 9 devices"),
        (["trace", str(checkpoint), "--length", "99999", "--out", str(tmp_path / "t"),
          "--max-tokens", "70000"], "are longer than the model's context of 32,768"),
        (["trace", str(checkpoint), "--out", str(empty / "t")], "Not a directory"),
        (["place", str(trace), "--devices", "2", "--out", "x"], "belong together"),
        (["place", str(trace), "--devices", "2", "--nodes", "0"], "0 nodes and batches of 64"),
        (["place", str(trace), "--devices", "2", "--batch", "0"], "batches of 0 tokens cannot be"),
        (["regroup", str(checkpoint), "--trace", str(trace), "--devices", "3", "--groups", "4",
          "--out", str(tmp_path / "m")], "4 groups do not stand on 3 devices"),
        (["regroup", str(checkpoint), "--trace", str(trace), "--devices", "0",
          "--out", str(tmp_path / "m")], "0 groups on 0 devices cannot be"),
        (["regroup", str(checkpoint), "--trace", str(trace), "--devices", "2", "--heal", "-1",
          "--out", str(tmp_path / "m")], "--heal -1 --labels 0.5 cannot be"),
        (["regroup", str(checkpoint), "--trace", str(trace), "--devices", "2", "--labels", "3",
          "--out", str(tmp_path / "m")], "--heal 0 --labels 3 cannot be"),
        (["regroup", str(checkpoint), "--trace", str(trace), "--devices", "8",
          "--out", str(tmp_path / "m")], "4 picks a token cannot be shared equally by 8 groups"),
    ):  # fmt: skip
        assert main(args) in (1, 2)
        assert words in capsys.readouterr().err
    meta = json.loads((trace / "trace.json").read_text())
    meta["model"]["weights_hash"] = "0" * 32
    other = tmp_path / "other"
    other.mkdir()
    (other / meta["stats_file"]).write_bytes((trace / meta["stats_file"]).read_bytes())
    (other / "trace.json").write_text(json.dumps(meta))
    args = ["regroup", str(checkpoint), "--trace", str(other), "--devices", "2"]
    assert main([*args, "--out", str(tmp_path / "m")]) == 2
    assert "the trace was made with another model: weights_hash" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
