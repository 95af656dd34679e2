"""A recipe runs to an exported model, and goes on bit by bit after any kind of end."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from mogul.core.errors import ArtifactError, ConfigError, MogulError
from mogul.models import load_model
from mogul.spec.trace import load_trace
from mogul.train import checkpoint, state
from mogul.train import session as session_module
from mogul.train.session import CHECKPOINTS, MODEL, Session


def _run(recipe, folder, *, resume=False):
    with Session(recipe, folder, resume=resume) as session:
        session.run()
        return session


def _files(session) -> dict[str, torch.Tensor]:
    """Every tensor of a session's state."""
    return {f"{f}/{n}": t for f, ts in state.take(session).tensors.items() for n, t in ts.items()}


def _same(first, second) -> bool:
    a, b = _files(first), _files(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(recipe, tmp_path, capsys):
    session = _run(recipe(log__report=True), tmp_path)
    assert capsys.readouterr().err.splitlines()[-1].startswith("trained 6 steps")
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 2 * 32
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rho_2"] == 1.0  # two groups on two devices: by construction
    assert lines[-1]["max_vio_in_groups"] >= 0
    assert lines[-1]["bits_per_byte"] > 0
    loads = [json.loads(line) for line in (tmp_path / "loads.jsonl").read_text().splitlines()]
    assert all(sum(row) == 2 * 32 * 2 for line in loads for row in line["rows"])
    assert load_trace(tmp_path / "trace").meta.num_tokens == 6 * 64
    page = (tmp_path / "report.html").read_text()
    assert "Rows of every expert" in page
    assert "<h3>Bits per byte</h3>" not in page  # one point: a card above tells it
    assert checkpoint.steps_in(tmp_path / CHECKPOINTS) == [4, 6]  # keep = 2
    loaded = load_model(tmp_path / MODEL)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, session.model.eval()(input_ids=ids).logits)
    assert (tmp_path / MODEL / "tokenizer.json").exists()


def test_a_run_without_plotly_ends_well_and_says_what_is_missing(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "mogul.draw.interactive", None)
    _run(recipe(log__report=True), tmp_path)
    assert "no report.html: " in (told := capsys.readouterr().err)
    assert "pip install 'mogul[draw]', then --resume writes it" in told
    assert (tmp_path / MODEL).is_dir()
    assert not (tmp_path / "report.html").exists()
    monkeypatch.undo()
    _run(recipe(log__report=True), tmp_path, resume=True)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("changes", [{}, {"run__accumulation": 2, "optimizer__kind": "adamw"}])
def test_resumed_is_bit_identical(recipe, tmp_path, changes):
    whole = _run(recipe(**changes), tmp_path / "whole")
    part = recipe(**changes)
    with Session(part, tmp_path / "part") as session:
        for _ in range(3):
            session.take_step()
        checkpoint.write(tmp_path / "part" / CHECKPOINTS, state.take(session), keep=2)
    resumed = _run(part, tmp_path / "part", resume=True)
    assert _same(whole, resumed)


def test_resumed_with_a_batch_waiting_is_bit_identical(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mogul.train.guard.RETURN_AFTER_STEPS", 3)
    spiky = recipe(run__spike_factor=9.0)
    with monkeypatch.context() as patch:
        _spoil(patch, at=(2,))
        whole = _run(spiky, tmp_path / "whole")
    with monkeypatch.context() as patch, Session(spiky, tmp_path / "part") as session:
        _spoil(patch, at=(2,))
        for _ in range(4):
            session.take_step()
        checkpoint.write(tmp_path / "part" / CHECKPOINTS, state.take(session), keep=2)
    resumed = _run(spiky, tmp_path / "part", resume=True)
    assert resumed.optimizer.num_updates == 5
    assert _same(whole, resumed)


def test_sigterm_saves_and_stops(recipe, tmp_path, monkeypatch):
    taken = Session.take_step

    def kill_at_three(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(self)

    rare = recipe(checkpoint__every_steps=100)
    monkeypatch.setattr(Session, "take_step", kill_at_three)
    with Session(rare, tmp_path / "part") as session:
        assert session.run() is False
    assert checkpoint.steps_in(tmp_path / "part" / CHECKPOINTS) == [4]
    assert not (tmp_path / "part" / MODEL).exists()
    monkeypatch.undo()
    resumed = _run(rare, tmp_path / "part", resume=True)
    assert _same(resumed, _run(rare, tmp_path / "whole"))
    assert [line["step"] for line in _lines(tmp_path / "part")] == [1, 2, 3, 4, 5, 6]


def test_a_signal_after_the_last_step_stops_nothing(recipe, tmp_path, monkeypatch):
    real = session_module.export

    def killed_meanwhile(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(session_module, "export", killed_meanwhile)
    with Session(recipe(), tmp_path) as session:
        assert session.run() is True
    assert (tmp_path / MODEL).exists()


def test_a_damaged_checkpoint_is_passed_over(recipe, tmp_path, capsys):
    whole = _run(recipe(), tmp_path)
    newest = tmp_path / CHECKPOINTS / "step-00000006" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with Session(recipe(), tmp_path, resume=True) as session:
        assert session.step == 4
        assert "step 6 is passed over" in capsys.readouterr().err
        while session.step < 6:
            session.take_step()
        assert _same(session, whole)


def _save_and_raise(recipe, folder, error):
    with Session(recipe, folder) as session:
        session.saver.save(state.take(session))
        if error:
            raise error


def test_leaving_a_session_waits_for_the_writer(recipe, tmp_path, monkeypatch):
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *all: (time.sleep(0.5), write(*all))[1])
    with pytest.raises(KeyError):
        _save_and_raise(recipe(), tmp_path, KeyError)
    assert checkpoint.steps_in(tmp_path / CHECKPOINTS) == [0]


@pytest.mark.parametrize("earlier", [None, KeyError])
def test_leaving_a_session_tells_what_the_writer_met(
    recipe, tmp_path, monkeypatch, capsys, earlier
):
    def full(*_all):
        raise ArtifactError("the disk is full")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(earlier or ArtifactError):
        _save_and_raise(recipe(), tmp_path, earlier)
    assert ("the last checkpoint was not written" in capsys.readouterr().err) == bool(earlier)


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_a_session_leaves_the_deterministic_flag_as_it_was(recipe, tmp_path, before):
    def flags():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        session = Session(recipe(run__deterministic=True), tmp_path)
        assert flags() == before
        with session:
            assert flags() == (True, False)
        assert flags() == before
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("turned", [False, True])
def test_the_norm_takes_dtypes_in_the_order_of_the_parameters(monkeypatch, turned):
    from mogul.train import step

    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    dtypes = dtypes[::-1] if turned else dtypes
    seen, promote = [], torch.promote_types
    monkeypatch.setattr(torch, "promote_types", lambda a, b: (seen.append(a), promote(a, b))[1])
    step._norm([torch.ones(2, dtype=dtype) for dtype in dtypes])
    assert seen == dtypes


def _damage(root, *steps):
    """Checkpoint folders of these steps that are not whole."""
    for step in steps:
        (root / f"step-{step:08d}").mkdir(parents=True)


def test_damaged_checkpoints_of_later_steps_do_not_push_out_a_new_one(tmp_path):
    _damage(tmp_path, 90, 103)
    for step in (8, 9, 10):
        checkpoint.write(tmp_path, checkpoint.Snapshot(step, {}, {}), keep=2)
    assert checkpoint.steps_in(tmp_path) == [9, 10, 90, 103]


def test_damaged_checkpoints_are_set_aside(tmp_path, capsys):
    checkpoint.write(tmp_path, checkpoint.Snapshot(10, {}, {}), keep=2)
    for _ in range(2):
        _damage(tmp_path, 90, 103)
        assert checkpoint.read_newest(tmp_path).step == 10
        assert "step-00000090 is damaged: renamed to" in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "step-00000010",
        "step-00000090.damaged",
        "step-00000090.damaged-1",
        "step-00000103.damaged",
        "step-00000103.damaged-1",
    ]


def test_a_run_without_a_whole_checkpoint_does_not_start_at_zero(recipe, tmp_path):
    _damage(tmp_path / CHECKPOINTS, 90, 103)
    for _ in range(2):  # the second time too
        with pytest.raises(ArtifactError, match="none of the 2 checkpoints") as caught:
            Session(recipe(), tmp_path, resume=True)
        assert "to start anew" in caught.value.__notes__[0]


@pytest.mark.parametrize("change", [{"files": None}, {"files": [1]}, {"step": None}, {"step": "2"}])
def test_a_state_without_files_or_step_is_damaged(tmp_path, change):
    for step in (1, 2):
        checkpoint.write(tmp_path, checkpoint.Snapshot(step, {}, {}), keep=2)
    file = tmp_path / "step-00000002" / "state.json"
    content = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: x for key, x in content.items() if x is not None}))
    assert checkpoint.read_newest(tmp_path).step == 1


class _Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_no_pickle_is_ever_read(recipe, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    _run(recipe(), tmp_path / "run")
    bomb = pickle.dumps(_Bomb())
    for folder in (tmp_path / "run" / CHECKPOINTS).iterdir():
        for name in ("optimizer.pt", "pytorch_model.bin", "more.bin", "training_args.bin"):
            (folder / name).write_bytes(bomb)
    with Session(recipe(run__steps=8), tmp_path / "run", resume=True) as session:
        assert session.step == 6
    newest = tmp_path / "run" / CHECKPOINTS / "step-00000006"
    (newest / "model.safetensors").write_bytes(bomb)
    content = json.loads((newest / "state.json").read_text())
    content["files"]["model.safetensors"] = checkpoint._seal_of(newest / "model.safetensors")
    (newest / "state.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="is no safetensors file"):
        checkpoint.read(newest)
    content["files"] = {"../evil.safetensors": {}}
    (newest / "state.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="strange file"):
        checkpoint.read(newest)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch, asynchronous):
    part = recipe(checkpoint__asynchronous=asynchronous)
    save = checkpoint.save_file
    calls = []

    def full_later(tensors, file):
        calls.append(file)
        if len(calls) == 5:  # the second file of the second checkpoint
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full_later)
    with pytest.raises(ArtifactError, match="no space left to write"):
        _run(part, tmp_path)
    monkeypatch.undo()
    assert checkpoint.steps_in(tmp_path / CHECKPOINTS) == [2]
    assert not list((tmp_path / CHECKPOINTS).glob(".*"))
    assert _same(_run(part, tmp_path, resume=True), _run(part, tmp_path / "whole"))


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ArtifactError, match=r"run needs .* but only 1000 B are free"):
        Session(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_with_the_checkpoint_whole(recipe, tmp_path, monkeypatch):
    _spoil(monkeypatch, at=(4,))
    with pytest.raises(MogulError, match="the loss is nan at step 4"):
        _run(recipe(), tmp_path)
    assert checkpoint.read_newest(tmp_path / CHECKPOINTS).step in (2, 4)


def test_a_spike_changes_nothing_and_its_batch_returns(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mogul.train.guard.RETURN_AFTER_STEPS", 2)
    _spoil(monkeypatch, at=(2,))
    seen = []
    with Session(recipe(run__spike_factor=6.0, run__steps=8), tmp_path) as session:
        gradients = session.stepper.gradients
        session.stepper.gradients = lambda batches: (seen.append(batches), gradients(batches))[1]
        for step in range(5):
            before = _files(session)
            session.take_step()
            after = _files(session)
            kept = [name for name in before if not name.startswith("more/")]
            changed = [name for name in kept if not torch.equal(before[name], after[name])]
            assert bool(changed) == (step != 2)
        assert session.optimizer.num_updates == 4
    assert torch.equal(seen[4][0], seen[2][0])  # the same batch, two steps later
    assert not torch.equal(seen[3][0], seen[2][0])


def _spoil(monkeypatch, *, at):
    """Let the gradients of some steps be no number."""
    from mogul.train.step import Stepper

    original, calls = Stepper.gradients, []

    def spoiled(self, batches):
        found = original(self, batches)
        calls.append(1)
        if len(calls) - 1 in at:
            object.__setattr__(found, "loss", math.nan)
        return found

    monkeypatch.setattr(Stepper, "gradients", spoiled)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_in_float64_keeps_its_state_so_wide(recipe, tmp_path, kind):
    session = _run(recipe(run__precision="float64", optimizer__kind=kind), tmp_path)
    kinds = {t.dtype for n, t in _files(session).items() if n.startswith(("model", "optimizer"))}
    assert kinds == {torch.float64, torch.float32}
    assert all(t.dtype == torch.float64 for p, t in session.optimizer.tensors(session.names))
    assert load_trace(tmp_path / "trace").meta.num_tokens == 6 * 64


def test_held_out_loss_comes_as_often_as_asked(recipe, tmp_path):
    """Also between the steps that are told."""
    changes = {"log__every_steps": 4, "log__eval_every_steps": 3, "run__steps": 7}
    _run(recipe(**changes), tmp_path)
    told = {line["step"]: "held_out_loss" in line for line in _lines(tmp_path)}
    assert told == {3: True, 4: False, 6: True, 7: True}


def test_a_damaged_line_of_numbers_does_not_stop_a_run(recipe, tmp_path):
    _run(recipe(log__report=True), tmp_path)
    for name in ("metrics.jsonl", "loads.jsonl"):
        file = tmp_path / name
        damaged = file.read_bytes().replace(b'"step": 2', b'"stup": 2') + b'3\n\xff{"a"\n'
        file.write_bytes(damaged)
    assert _run(recipe(log__report=True, run__steps=7), tmp_path, resume=True).step == 7
    assert [line["step"] for line in _lines(tmp_path)] == [1, 3, 4, 5, 6, 7]


def test_multi_token_prediction_is_trained_and_exported(recipe, tmp_path):
    config = {**recipe().model.config, "num_nextn_predict_layers": 1}
    _run(recipe(model__config=config, run__steps=2), tmp_path)
    assert load_trace(tmp_path / "trace").meta.layers == (0, 1)
    loaded = load_model(tmp_path / MODEL)
    assert loaded.model.layers[2].eh_proj.weight.shape == (32, 64)


def test_a_checkpoint_is_trained_further(recipe, tmp_path, capsys):
    """A model without a selection bias gets one when the recipe balances by it."""
    plain = recipe(balance__bias="none", run__steps=2)
    _run(plain, tmp_path / "first")
    origin = {"checkpoint": str(tmp_path / "first" / MODEL)}
    values = {**plain.model_dump(), "model": origin, "balance": {"bias": "sign", "loss": "none"}}
    second = type(plain).parse(values)
    with Session(second, tmp_path / "second") as session:
        assert "new tensors, not in the checkpoint: 2" in capsys.readouterr().err
        before = load_model(tmp_path / "first" / MODEL)
        assert torch.equal(session.model.lm_head.weight, before.lm_head.weight)
        session.run()
    bias = session.model.model.layers[0].mlp.gate.e_score_correction_bias
    assert bias.abs().max() > 0
    again = load_model(tmp_path / "second" / MODEL)
    assert torch.equal(again.model.layers[0].mlp.gate.e_score_correction_bias, bias)
    odd = type(plain).parse({**values, "model": {**origin, "overrides": {"hidden_size": 64}}})
    with pytest.raises(ConfigError, match="changes the tensors"):
        Session(odd, tmp_path / "third")
    typo = type(plain).parse({**values, "model": {**origin, "overrides": {"hiden_size": 64}}})
    with pytest.raises(ConfigError, match="no key 'hiden_size'"):
        Session(typo, tmp_path / "third")


def test_a_dense_model_is_upcycled_and_trained(recipe, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    dense.save_pretrained(tmp_path / "dense")
    origin = {"checkpoint": str(tmp_path / "dense"), "experts": 8, "groups": 4}
    values = {**recipe(run__steps=2).model_dump(), "model": {"upcycle": origin}}
    session = _run(type(recipe()).parse(values), tmp_path / "run")
    assert session.model.config.num_experts == 8
    assert load_model(tmp_path / "run" / MODEL).config.router_n_groups == 4


def test_a_dense_model_is_trained_without_balance(recipe, tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    values = {**recipe(run__steps=2).model_dump(), "model": {"config": config}}
    values["balance"] = {"bias": "none"}
    _run(type(recipe()).parse(values), tmp_path)
    assert "max_vio" not in _lines(tmp_path)[-1]
    assert not (tmp_path / "trace").exists()
