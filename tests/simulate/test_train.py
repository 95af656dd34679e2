"""Training: FLOP, bubbles, recomputation, the host, what copies send, and the published rows."""

import copy

import pytest

from mogul.core.errors import ConfigError
from mogul.simulate import train_device, train_traffic
from mogul.simulate.train import predict_training
from mogul.simulate.train_plan import TrainPlan, flop_per_token, stage_layers
from mogul.simulate.validate import training
from mogul.simulate.validate.scoreboard import scores
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.parallel import Parallel
from mogul.spec.presets import config
from mogul.spec.quant import QuantScheme

H100, H200 = hardware("h100"), hardware("h200")
QWEN = model_spec(config("qwen3-30b-a3b"))
BIG = model_spec(config("qwen3-235b-a22b"))
DEEPSEEK = model_spec(config("deepseek-v3"))


def test_training_flop_and_bubbles():
    dense = model_spec(config("qwen3-8b"))
    assert flop_per_token(dense, 1) == pytest.approx(
        6 * dense.active_params(input_embedding=False), rel=0.01
    )
    plan = TrainPlan(devices=16, global_batch=64, sequence_tokens=2048)
    flat = predict_training(dense, H100, Parallel(tp=2), plan)
    piped = predict_training(dense, H100, Parallel(tp=2, pp=4), plan)
    assert flat.bubble == 0
    assert piped.bubble == pytest.approx(3 / 32 / (1 + 3 / 32))
    assert 0.2 < flat.mfu < 0.8
    more = predict_training(dense, H100, Parallel(tp=2, pp=4), plan.replace(virtual_stages=2))
    assert more.bubble < piped.bubble


def test_training_memory_and_recomputation():
    plan = TrainPlan(devices=8, global_batch=64)
    none = predict_training(QWEN, H200, Parallel(dp=8), plan.replace(recompute="none"))
    full = predict_training(QWEN, H200, Parallel(dp=8), plan.replace(recompute="full"))
    assert none.memory.total_bytes > full.memory.total_bytes
    assert none.step_s < full.step_s
    with pytest.raises(ConfigError, match="does not divide"):
        predict_training(QWEN, H200, Parallel(dp=8), plan.replace(global_batch=65))


def test_published_flop_a_token_are_reproduced():
    # TFLOP/s over tokens/s of Megatron-Bridge 26.08; DeepSeek-V3 with its further token.
    for model, further, published in ((BIG, 0, 148.1e9), (QWEN, 0, 23.1e9), (DEEPSEEK, 1, 260e9)):
        assert flop_per_token(model, 4096, further) == pytest.approx(published, rel=0.005)


def test_the_fullest_stage_paces_the_pipe():
    assert stage_layers(94, Parallel(pp=32), 3) == (3, 1)
    assert stage_layers(94, Parallel(pp=8), 4) == (12, 10)
    assert stage_layers(32, Parallel(pp=4), 1) == (8, 8)
    plan = TrainPlan(devices=64, global_batch=512, virtual_stages=4)
    even = predict_training(BIG, H100, Parallel(dp=8, pp=8), plan)
    uneven = predict_training(BIG, H100, Parallel(dp=8, pp=8), plan.replace(virtual_stages=11))
    assert uneven.parts["experts"] > 0.9 * even.parts["experts"]  # 22 chunks of 1 hold 88 layers


def test_dualpipe_wastes_less_of_the_pipe():
    plan = TrainPlan(devices=128, global_batch=512, recompute="full")
    layout = Parallel(dp=8, pp=16)
    ends = plan.replace(schedule="dualpipe")
    assert ends.bubble(layout) == pytest.approx(7 * 2 / 3 / 64)
    assert plan.bubble(layout) == pytest.approx(15 / 64)


def test_the_host_constant_is_the_guides_baseline():
    guide = TrainPlan(devices=256, global_batch=2048, virtual_stages=4, sends_once=False)
    layout = Parallel(dp=32, ep=32, pp=8)
    now = train_device.host_kernels(DEEPSEEK, layout, guide, QuantScheme(weights="fp8_block"))
    local, products = 256 / 32, 5 + 2
    then = now + (72 - 31) + 3 * (products + 2 * local)  # five kernels an operand, not two
    assert then == pytest.approx(241)
    layer_s = flop_per_token(DEEPSEEK, 4096) * 4096 / 494.46e12 / 8 / (61 / 8)
    assert layer_s == pytest.approx(3 * then * train_device.HOST_S, rel=0.01)


def test_graphs_free_the_host():
    plan = TrainPlan(devices=64, global_batch=256, recompute="none")
    layout = Parallel(tp=4, dp=2, pp=8)
    eager, partly, wholly = (
        predict_training(BIG, H100, layout, plan.replace(graphs=kind))
        for kind in ("none", "partial", "full")
    )
    assert eager.parts["host"] > 0
    assert eager.step_s > partly.step_s >= wholly.step_s
    assert "host" not in wholly.parts


def test_copies_of_an_expert_talk_over_one_adapter_each():
    plan = TrainPlan(devices=256, global_batch=2048, shards_weights=True)
    near = train_traffic.gradients_s(BIG, H100, Parallel(dp=8, ep=8), plan)
    experts = sum(BIG.moe.grouping.num_experts // 8 * 3 * 4096 * 1536 * 2 for _ in range(94))
    one_pass_s = experts * 31 / 32 / (0.8 * 50e9)
    # every micro-batch: two gathers and a reduction of the experts, and a little else
    assert near == pytest.approx(8 * 3 * one_pass_s, rel=0.25)


def test_balance_recomputation_and_context_change_what_they_should():
    plan = TrainPlan(devices=64, global_batch=64, sequence_tokens=16384, recompute="none")
    layout = Parallel(tp=4, dp=2, ep=8, pp=8)
    one = predict_training(BIG, H100, layout, plan)
    even = predict_training(BIG, H100, layout, plan.replace(is_balanced=True))
    assert even.parts["experts"] < one.parts["experts"]
    again = predict_training(BIG, H100, layout, plan.replace(recompute="experts"))
    assert again.parts["exchange"] == pytest.approx(1.5 * one.parts["exchange"])
    cut = predict_training(BIG, H100, layout, plan.replace(context_parallel=2))
    assert cut.parts["attention"] == pytest.approx(one.parts["attention"], rel=0.1)
    assert cut.memory.parts["activations"] == pytest.approx(
        one.memory.parts["activations"] / 2, rel=0.01
    )
    with pytest.raises(ConfigError, match="context_parallel=3"):
        predict_training(BIG, H100, layout, plan.replace(context_parallel=3))


def test_a_further_token_costs_a_layer_and_the_head():
    plan = TrainPlan(devices=64, global_batch=64, recompute="none")
    plain = predict_training(DEEPSEEK, H200, Parallel(dp=64), plan)
    more = predict_training(DEEPSEEK, H200, Parallel(dp=64), plan.replace(mtp_layers=1))
    assert more.parts["head"] > 2 * plain.parts["head"]
    assert more.parts["experts"] == pytest.approx(plain.parts["experts"] * 62 / 61, rel=0.01)


def test_training_rows_hold_their_bars():
    (score,) = scores(("training",))
    assert {bar.metric for bar in score.bars if not bar.holds} == set()


def test_a_published_speed_cannot_change_its_prediction(monkeypatch):
    plain = {row.name: row.zero_shot for row in training.training_rows()[0]}
    data = copy.deepcopy(training.load("training"))
    for row in data["row"]:
        for key in ("measured_tflops", "measured_tokens_per_s", "measured_step_s"):
            if key in row:
                row[key] *= 3.0
    monkeypatch.setattr(training, "load", lambda _: data)
    assert {row.name: row.zero_shot for row in training.training_rows()[0]} == plain
