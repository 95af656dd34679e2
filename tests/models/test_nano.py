"""The carried models: small, strict, offline, real, and twins but for their routing."""

from __future__ import annotations

import json

import pytest
import torch

from mogul.cli.main import main
from mogul.core.errors import ArtifactError
from mogul.models import load, load_model, load_tokenizer
from mogul.observe.recorder import record_routing
from mogul.spec.carried import NAMES, carried_folder
from mogul.train.data import shipped_text, token_windows
from mogul.train.evaluate import held_out_loss


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("a carried model must not ask the hub")

    monkeypatch.setattr(load, "snapshot_download", refuse)


@pytest.fixture(scope="module", params=NAMES)
def nano(request):
    return request.param, load_model(request.param, dtype="float32"), load_tokenizer(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_small_with_recipe_log_and_card(name):
    folder = carried_folder(name)
    assert (folder / "model.safetensors").stat().st_size < 5_000_000
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["run"]["steps"] > 0
    assert "bits_per_byte" in json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert "held-out bits per byte" in (folder / "README.md").read_text()


def test_twins_differ_in_their_groups_only():
    configs = [json.loads((carried_folder(n) / "config.json").read_text()) for n in NAMES]
    differing = {k for k in configs[0] if configs[0][k] != configs[1].get(k)}
    assert differing == {"router_n_groups"}
    recipes = [json.loads((carried_folder(n) / "recipe.json").read_text()) for n in NAMES]
    assert recipes[0]["recipe"]["run"] == recipes[1]["recipe"]["run"]
    assert recipes[0]["recipe"]["data"] == recipes[1]["recipe"]["data"]


def test_has_learnt_english(nano):
    _, model, tokenizer = nano
    windows = token_windows(shipped_text().held_out, tokenizer, 128).spread(16)
    assert held_out_loss(model, windows).bits_per_byte < 2.6  # a byte model without training: 8


@torch.no_grad()
def test_the_mtp_layer_guesses_better_than_chance(nano):
    _, model, tokenizer = nano
    ids = torch.from_numpy(token_windows(shipped_text().held_out, tokenizer, 128).spread(16).ids)
    out = model.model(ids)
    own = model.lm_head(out.last_hidden_state).argmax(-1)
    guess = model.mtp(out.last_hidden_state[:, :-1], ids[:, 1:]).argmax(-1)
    commonest = (own[:, 1:] == own[:, 1:].flatten().mode().values).float().mean()
    agreed = (guess == own[:, 1:]).float().mean()
    assert agreed > 2 * commonest
    assert agreed > 0.25


def test_every_expert_works_and_groups_hold(nano):
    name, model, tokenizer = nano
    ids = torch.from_numpy(token_windows(shipped_text().held_out, tokenizer, 128).spread(16).ids)
    with record_routing(model) as recording, torch.no_grad():
        model(ids)
    picks = recording.ids()
    rows = [torch.bincount(torch.from_numpy(layer).flatten(), minlength=16) for layer in picks]
    assert all((row > 0).all() for row in rows)
    in_groups = torch.stack(rows).unflatten(1, (4, 4)).sum(2)
    assert bool((in_groups == picks.shape[1]).all()) is (name == "nano")


@pytest.mark.parametrize("name", NAMES)
def test_generates_from_the_command_line(name, capsys):
    words = ["generate", name, "--prompt", "The word is", "--max-new-tokens", "12"]
    assert main([*words, "--device", "cpu", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert len(first.split()) > 3
    assert main([*words, "--device", "cpu", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"config.json"):
        load_model("nano")


def test_an_unknown_name_tells_of_the_carried_ones():
    with pytest.raises(ArtifactError) as caught:
        load_model("nanoo")
    assert "mogul itself carries nano and nano-topk" in str(caught.value.__notes__)
