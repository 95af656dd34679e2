"""Recipes: one base, changes from the command line, and every mistake by its name."""

from __future__ import annotations

import json

import pytest

from mogul.cli.main import main
from mogul.core.errors import ArtifactError, ConfigError, MogulError
from mogul.train.recipe import Recipe
from mogul.train.recipe_file import read_recipe, read_resolved, write_resolved
from mogul.train.schedule import ScheduleSpec

BASE = """
[model.config]
vocab_size = 300
hidden_size = 32
[data]
sources = ["tokens"]
[run]
steps = 10
[optimizer]
lr = 0.01
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)
    child = 'extends = "base.toml"\n[model.config]\nhidden_size = 64\n[optimizer]\nkind = "muon"\n'
    (tmp_path / "child.toml").write_text(child)
    return tmp_path


def test_extends_and_set(files):
    recipe = read_recipe(
        files / "child.toml",
        ["optimizer.lr=0.5", "run.seed=3", "balance.bias=sign", 'data.sources=["a", "b"]'],
    )
    assert recipe.model.config == {"vocab_size": 300, "hidden_size": 64}
    assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.run.seed) == ("muon", 0.5, 3)
    assert recipe.balance.bias == "sign"
    assert [source.path for source in recipe.data.sources] == ["a", "b"]


def test_resolved_recipe_says_everything(files):
    recipe = read_recipe(files / "child.toml")
    write_resolved(recipe, files)
    assert read_resolved(files) == recipe
    content = json.loads((files / "recipe.json").read_text())
    assert content["versions"]["torch"]
    assert content["command"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.rl=1", r"\[optimizer\]: unknown key 'rl'"),
        ("otimizer.lr=1", "unknown key 'otimizer'"),
        ("optimizer.lr=-1", r"\[optimizer\]: lr: Input should be greater than 0"),
        ("optimizer.betas=[1.0, 0.95]", r"\[optimizer\]: betas.0: Input should be less than 1"),
        ("optimizer.betas=[0.9, 1.0]", r"\[optimizer\]: betas.1: Input should be less than 1"),
        ("optimizer.betas=[-0.1, 0.95]", "betas.0: Input should be greater than or equal to 0"),
        (
            "run.activation_checkpointing=-3",
            "activation_checkpointing.* greater than or equal to 0",
        ),
        ("run.tokens=100", "one of steps and tokens"),
        ("run.steps=none", "one of steps and tokens"),
        ("model.preset=pangu-pro-moe-72b", "config and preset"),
        ("balance.loss=batches", r"\[balance\]: loss"),
        ("run.seed=18446744073709551616", r"\[run\]: seed: Input should be less than"),
        ("nothing", "is no change"),
        ("run.seed.deeper=1", "'seed' is no table"),
    ],
)
def test_mistakes_are_named(files, change, words):
    changes = ["run.seed=1", change]
    with pytest.raises(ConfigError, match=words):
        read_recipe(files / "base.toml", changes)


def test_unknown_config_keys_are_named(files):
    from mogul.train.build import build_model, choose_device

    for change, words in (
        ("model.config.num_expert=4", "no key 'num_expert'"),
        ("model.config.num_experts=7", "7"),
        ("model.config.model_type=mogge", "mogge"),
    ):
        recipe = read_recipe(files / "base.toml", [change])
        with pytest.raises(ConfigError, match=words):
            build_model(recipe, choose_device("cpu"))


def test_a_run_that_cannot_start_leaves_no_folder(files):
    from mogul.train.session import Session

    for change, words in (
        ("run.device=mars", "device 'mars' is unknown"),
        ("run.experts=mogull", r"\[run\] experts='mogull' is unknown\nfix: did you mean 'mogul'"),
        ("run.attention=sdpaa", r"\[run\] attention='sdpaa' is unknown"),
        ("model.config.hidden_size=-8", "hidden_size is -8"),
        ('data.sources=["no"]', "no does not exist"),
    ):
        recipe = read_recipe(files / "base.toml", [change])
        with pytest.raises(MogulError, match=words):
            Session(recipe, files / "run")
        assert not (files / "run").exists()


def test_a_seed_below_zero_is_refused(files):
    with pytest.raises(ConfigError, match=r"seed: .* greater than or equal to 0"):
        read_recipe(files / "base.toml", ["run.seed=-1"])


def test_a_carried_recipe_is_named_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe("tiny", ["run.steps=3"]).run.steps == 3
    (tmp_path / "tiny").mkdir()  # the folder of a run, perhaps
    assert read_recipe("tiny").run.steps == 200
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").write_text(BASE)  # a file of that name comes first
    assert read_recipe("tiny").run.steps != 200


def test_circles_and_missing_files(files):
    (files / "a.toml").write_text('extends = "b.toml"\n')
    (files / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(ConfigError, match="extends itself"):
        read_recipe(files / "a.toml")
    with pytest.raises(ArtifactError, match=r"cannot read .*no\.toml.*\n.*that mogul brings: tiny"):
        read_recipe(files / "no.toml")
    (files / "bad.toml").write_text("[run\n")
    with pytest.raises(ArtifactError, match="is no TOML"):
        read_recipe(files / "bad.toml")


def test_tokens_are_rounded_up_to_steps():
    values = {
        "model": {"preset": "smollm2-135m"},
        "data": {"sources": ["x"]},
        "run": {"tokens": 1001, "batch_size": 2, "sequence_length": 10, "accumulation": 5},
    }
    assert Recipe.parse(values).run.num_steps == 11


def test_schedules():
    wsd = ScheduleSpec(kind="wsd", warmup_steps=10, decay_share=0.2, final_ratio=0.1)
    factors = [wsd.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert set(factors[9:81]) == {1.0}
    assert factors[90] == pytest.approx(0.55)
    assert factors[99] == pytest.approx(0.1 + 0.9 / 20)
    cosine = ScheduleSpec(kind="cosine", warmup_steps=0, final_ratio=0.0)
    assert cosine.factor(50, 100) == pytest.approx(0.5)
    assert ScheduleSpec(kind="constant").factor(10**6, 100) == 1.0


def test_the_command_trains_resumes_and_names_mistakes(token_folder, tmp_path, capsys):
    text = BASE.replace('"tokens"', f'"{token_folder}"') + "[log]\nreport = false\n"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    small = [
        "--set", "model.config.num_hidden_layers=1", "--set", "model.config.num_experts=4",
        "--set", "model.config.num_experts_per_tok=2",
        "--set", "model.config.num_attention_heads=2",
        "--set", "model.config.moe_intermediate_size=16", "--set", "run.steps=2",
        "--set", "run.batch_size=2", "--set", "run.sequence_length=16", "--set", "run.device=cpu",
    ]  # fmt: skip
    out = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(out), *small, "--with-code"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "model")
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mogul.MogeForCausalLM"
    assert main(["train", str(recipe), "--out", str(out), *small]) == 2
    assert "pass --resume" in capsys.readouterr().err
    more = [*small, "--set", "run.steps=3", "--resume"]
    assert main(["train", str(recipe), "--out", str(out), *more]) == 0
    assert "resumed at step 2 of 3" in capsys.readouterr().err


@pytest.mark.full
def test_exported_code_loads_without_importing_us_first(token_folder, tmp_path):
    """As a tool would that knows Transformers only."""
    import subprocess
    import sys

    import torch

    from mogul.models import MogeConfig, MogeForCausalLM
    from mogul.train.export import export

    model = MogeForCausalLM(
        MogeConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    )  # fmt: skip
    export(model, tmp_path / "model", with_code=True)
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(m(input_ids=torch.arange(8)[None]).logits.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")],
        capture_output=True, text=True, check=True,
        env={"HF_HOME": str(tmp_path), "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    want = model.eval()(input_ids=torch.arange(8)[None]).logits.sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(want, rel=1e-4, abs=1e-4)
