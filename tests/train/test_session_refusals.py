"""What cannot be trained is refused in words, before the first step."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from mogul.core.errors import ConfigError
from mogul.train.session import Session


def _run(recipe, folder, *, resume=False):
    with Session(recipe, folder, resume=resume) as session:
        session.run()
        return session


def test_fewer_steps_than_were_taken_are_refused(recipe, tmp_path):
    _run(recipe(), tmp_path)
    with pytest.raises(ConfigError, match=r"has 6 steps behind it, more than the 3 of the recipe"):
        Session(recipe(run__steps=3), tmp_path, resume=True)
    assert _run(recipe(run__steps=7), tmp_path, resume=True).step == 7


def test_sequences_too_short_for_multi_token_prediction_are_refused(recipe, tmp_path):
    config = {"num_nextn_predict_layers": 1}
    short = recipe(run__sequence_length=2, model__config=config)
    with pytest.raises(ConfigError, match=r"token after next.*\n.* 3 or more"):
        Session(short, tmp_path)
    assert not list(tmp_path.iterdir())


def test_attention_that_is_not_installed_is_named(recipe, tmp_path):
    if find_spec("flash_attn"):
        pytest.skip("FlashAttention is installed")
    with pytest.raises(ConfigError, match="attention='flash_attention_2' cannot be used here"):
        Session(recipe(run__attention="flash_attention_2"), tmp_path)


def test_a_tokenizer_that_is_not_there_is_told_before_the_first_step(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(ConfigError, match=rf"{name} holds no tokenizer"):
            Session(recipe(model__tokenizer=str(tmp_path / name)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_are_not_mixed(recipe, tmp_path):
    _run(recipe(), tmp_path)
    with pytest.raises(ConfigError, match="holds checkpoints of another run") as caught:
        Session(recipe(), tmp_path)
    assert "--resume" in caught.value.__notes__[0]
    with pytest.raises(ConfigError, match=r"changed: optimizer\.lr"):
        Session(recipe(optimizer__lr=0.02), tmp_path, resume=True)
    longer = _run(recipe(run__steps=7), tmp_path, resume=True)
    assert longer.step == 7


def test_a_larger_mesh_and_a_missing_tensorboard_are_refused(recipe, tmp_path):
    mesh = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ConfigError, match="a mesh of 2 devices is not built"):
        Session(recipe(), tmp_path, mesh=mesh)
    if find_spec("tensorboard") is None:
        with pytest.raises(ConfigError, match="tensorboard is not installed"):
            _run(recipe(log__tensorboard=True), tmp_path / "board")
    else:
        _run(recipe(log__tensorboard=True), tmp_path / "board")
        assert list((tmp_path / "board" / "tensorboard").iterdir())


def test_a_small_vocabulary_is_refused(recipe, tmp_path):
    config = {**recipe().model.config, "vocab_size": 200}
    with pytest.raises(
        ConfigError, match=r"the data have ids up to 2\d\d, the model a vocabulary of 200"
    ):
        Session(recipe(model__config=config), tmp_path)
