"""`mogul calibrate` writes what `--quantise` reads."""

from __future__ import annotations

import json

import pytest
import torch

from mogul.cli.main import main
from mogul.models import load_model, load_tokenizer
from mogul.models.input_stats import FILE, read_stats
from mogul.models.quantise_linears import linear_inputs
from mogul.serve.kv_scales import read_scales
from mogul.spec.carried import carried_folder


def test_both_files_are_written_and_read(capsys, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the router sends every token to one expert in every group " * 40)
    args = ["calibrate", checkpoint, "--data", text, "--out", tmp_path, "--max-tokens", 200,
            "--length", 64, "--device", "cpu", "--format", "json"]  # fmt: skip
    assert main([*map(str, args)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["measured"] for row in rows] == ["inputs of layers", "keys and values"]
    assert rows[0]["file"] == str(tmp_path / FILE)
    stats = read_stats(tmp_path, checkpoint=checkpoint)
    assert stats is not None
    assert stats.num_tokens == 200
    assert stats.sources[0].startswith(str(text))
    scales = read_scales(tmp_path)
    assert scales is not None
    assert len(scales.keys) == 2
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False)
    windows = [ids[at : at + 64] for at in range(0, len(ids), 64)]
    model = load_model(checkpoint)
    near = linear_inputs(model, [torch.tensor([w]) for w in windows])  # of all the text, not 200
    for name, want in near.items():
        assert 0.5 < float(stats.importance[name].mean() / want.mean()) < 2, name


def test_no_sequences_are_refused_before_anything_is_read(capsys, tmp_path):
    assert main(["calibrate", str(tmp_path / "absent"), "--batch", "0"]) != 0
    assert "use --batch 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nano", str(carried_folder("nano"))])
def test_a_model_that_mogul_carries_is_left_as_it_is(capsys, name):
    assert main(["calibrate", name, "--max-tokens", "100"]) != 0
    error = capsys.readouterr().err
    assert f"{name} is part of mogul's installation" in error
    assert "--out" in error


def test_statistics_of_another_folder_are_read_by_name(capsys, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the router sends every token to one expert in every group " * 40)
    measure = ["calibrate", checkpoint, "--data", text, "--out", tmp_path, "--max-tokens", 200,
               "--length", 64, "--device", "cpu", "--no-kv-scales"]  # fmt: skip
    assert main([*map(str, measure)]) == 0
    speak = ["generate", checkpoint, "--prompt", "the router", "--max-new-tokens", "3",
             "--device", "cpu", "--statistics", tmp_path]  # fmt: skip
    assert main([*map(str, speak), "--quantise", "fp8"]) == 0
    assert "mogul calibrate" not in capsys.readouterr().err
    assert main([*map(str, speak)]) != 0
    assert "statistics are for quantising" in capsys.readouterr().err


def test_quantised_answers_tell_what_they_rounded_by(capsys, checkpoint, tmp_path):
    args = ["generate", checkpoint, "--prompt", "the router", "--quantise", "fp8",
            "--max-new-tokens", "3", "--device", "cpu"]  # fmt: skip
    assert main([*map(str, args)]) == 0
    assert f"mogul calibrate {checkpoint}" in capsys.readouterr().err
