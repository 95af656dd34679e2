import pytest

from mogul.core.errors import ConfigError
from mogul.simulate.collectives import collective
from mogul.simulate.engines import Engine, Overlap, engine
from mogul.simulate.machine import shipped_collectives
from mogul.simulate.memory import serving_memory, weight_bytes
from mogul.simulate.operators import Layout, Step, step_operators
from mogul.simulate.physics import demand
from mogul.simulate.routing import Routing
from mogul.simulate.run import Setting, predict
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.parallel import Parallel
from mogul.spec.presets import config, names
from mogul.spec.quant import QuantScheme, scheme
from mogul.spec.workload import Speculation, Workload

H100 = hardware("h100")
QWEN = model_spec(config("qwen3-30b-a3b"))
PANGU = model_spec(config("pangu-pro-moe-72b"))


@pytest.mark.parametrize("name", names())
def test_weights_sum_to_the_models(name):
    model = model_spec(config(name))
    total = sum(weight_bytes(model, Parallel(), QuantScheme()).values())
    assert total == pytest.approx(2 * model.params(), rel=0.002)


@pytest.mark.parametrize("name", names())
def test_products_of_a_prompt_match_the_active_parameters(name):
    """2 FLOP a parameter a token over all matrix products and experts."""
    model = model_spec(config(name))
    layout = Layout(model, Parallel(), QuantScheme(), Engine())
    operators, _ = step_operators(layout, Step(64, 1, 0.0, is_prefill=True), Routing())
    flop = sum(
        one.count * float(demand(one.kind, one.dims).flop)
        for one in operators
        if one.kind in ("gemm", "moe")
    )
    assert flop / 64 == pytest.approx(2 * model.active_params(input_embedding=False), rel=0.02)


def test_more_tensor_ranks_cut_the_work():
    one = predict(Setting(QWEN, H100), Workload(batch=16, arrival="together"))
    four = predict(Setting(QWEN, H100, Parallel(tp=4)), Workload(batch=16, arrival="together"))
    assert 1.3 < one.tpot_s / four.tpot_s < 4
    assert four.memory.parts["weights"] == pytest.approx(one.memory.parts["weights"] / 4, rel=0.01)


def test_eager_launches_cost():
    workload = Workload(batch=1, input_tokens=64)
    fast = predict(Setting(QWEN, H100), workload)
    slow = predict(Setting(QWEN, H100, engine=engine("transformers")), workload)
    assert slow.tpot_s > 2 * fast.tpot_s


def test_joined_launches_cost_nothing_while_decoding():
    workload = Workload(batch=1, input_tokens=64)
    joined, apart = (
        predict(Setting(QWEN, H100, engine=engine("mogul").replace(joins=joins)), workload)
        for joins in (True, False)
    )
    gone = {one.operator.name for one in apart.decode.operators} - {
        one.operator.name for one in joined.decode.operators
    }
    assert gone == {"norms", "rotation, cache", "top-k"}
    assert joined.tpot_s < apart.tpot_s
    assert joined.prefill.seconds == apart.prefill.seconds


def test_an_fp8_shared_expert_runs_in_the_routed_ones_call():
    """Where mogul joins launches: four more experts that every token picks, and no router."""
    model, fp8 = model_spec(config("pangu-pro-moe-72b")), QuantScheme(weights="fp8")

    def names(step, **given):
        layout = Layout(model, given.pop("parallel", Parallel()), quant=given.pop("quant", fp8),
                        engine=engine(given.pop("engine", "mogul")))  # fmt: skip
        return {one.name: one for one in step_operators(layout, step, Routing())[0]}

    decode, prompt = Step(8, 1, 1000.0), Step(1, 512, 0.0, is_prefill=True)
    together = names(decode)
    assert not {"router", "shared gate, up", "shared down"} & set(together)
    apart = names(decode, quant=QuantScheme())
    assert together["experts"].dims["distinct"] == pytest.approx(
        apart["experts"].dims["distinct"] + 4
    )
    assert together["experts"].dims["rows"] == pytest.approx(8 * 8 + 8 * 4)
    for others in (apart, names(prompt), names(decode, engine="vllm"),
                   names(decode, parallel=Parallel(tp=2))):  # fmt: skip
        assert {"router", "shared gate, up", "shared down"} <= set(others)


def test_grouped_routing_is_not_slower_than_free_routing_over_eight_ranks():
    free = PANGU.replace(moe=PANGU.moe.replace(grouping=PANGU.moe.grouping.replace(num_groups=1)))
    layout = Parallel(tp=8, ep=8)
    workload = Workload(batch=32, arrival="together")
    grouped, plain = (predict(Setting(m, H100, layout), workload) for m in (PANGU, free))
    assert grouped.decode.loads[0][1].rho == pytest.approx(1)
    assert grouped.tpot_s < plain.tpot_s


def test_overlap_lies_between_the_longer_part_and_the_sum():
    for kind in ("none", "chunked", "fine"):
        time = Overlap(kind=kind).seconds(3.0, 2.0)
        assert 3.0 <= time <= 5.0
    assert Overlap(kind="none").seconds(3.0, 2.0) == 5.0


def test_drafts_emit_more_tokens_a_step():
    plain = predict(Setting(QWEN, H100), Workload(batch=1, arrival="together"))
    drafted = predict(
        Setting(QWEN, H100),
        Workload(batch=1, arrival="together", speculation=Speculation(acceptance=1.0)),
    )
    assert drafted.tpot_s < plain.tpot_s


def test_a_model_that_does_not_fit_says_by_how_much():
    with pytest.raises(
        ConfigError, match=r"does not fit: .* too much; the largest part is weights"
    ):
        predict(Setting(PANGU, H100), Workload())
    with pytest.raises(ConfigError, match="does not fit") as caught:
        predict(Setting(QWEN, H100), Workload(batch=4096))
    assert "requests a copy" in caught.value.__notes__[0]


def test_bands_and_price():
    one = predict(Setting(QWEN, H100), Workload(batch=8))
    low, middle, high = one.tpot_band()
    assert low < middle < high
    assert one.dollars_per_million == pytest.approx(2.95 / 3600 / one.tokens_per_s_per_device * 1e6)


def test_memory_counts_every_part():
    memory = serving_memory(QWEN, Parallel(tp=2), scheme("fp8"), Workload(batch=8), H100, Engine())
    assert set(memory.parts) == {"weights", "cache", "activations", "runtime", "collectives"}
    expected = 8 * (2048 + 512) * QWEN.kv_bytes_per_token(1) / 2
    assert memory.parts["cache"] == pytest.approx(expected)


def test_collectives_grow_with_ranks_and_bytes():
    small = collective("all_reduce", 8, 8192, H100).seconds
    large = collective("all_reduce", 8, 2**30, H100).seconds
    assert 3e-6 < small < 3e-5
    assert large == pytest.approx(2 * 2**30 * 7 / 8 / (0.8 * 450e9), rel=0.05)
    assert collective("all_to_all", 16, 2**24, H100).seconds > (
        collective("all_to_all", 8, 2**24, H100).seconds
    )


def test_what_binds():
    setting = Setting(QWEN, H100)
    one = predict(setting, Workload(batch=1, input_tokens=8192, prefill_batch=1))
    many = predict(setting, Workload(batch=64, input_tokens=512))
    assert one.prefill.binding == "arithmetic"
    assert many.decode.binding == "memory"
    tiny = predict(Setting(model_spec(config("smollm2-135m")), H100), Workload(batch=1))
    assert tiny.decode.binding == "launches"
    assert sum(tiny.decode.limits().values()) == pytest.approx(sum(tiny.decode.parts().values()))


def test_measured_collectives_count_where_the_engine_uses_them():
    tables = shipped_collectives("h100")
    assert tables is not None
    assert {key[2] for key in tables.curves} == {2, 4}
    device, size = H100, 2.0**20
    two, four = (collective("all_reduce", n, size, device, tables) for n in (2, 4))
    assert (two.tier, four.tier) == ("measured", "measured")
    eight = collective("all_reduce", 8, size, device, tables)
    assert eight.tier == "interpolated"
    assert two.seconds < four.seconds < eight.seconds
    for name, used in (("mogul", tables), ("vllm", None)):
        setting = Setting(QWEN, device, Parallel(tp=2), engine=engine(name))
        assert setting.step_model().collectives is used
    assert shipped_collectives("mi300x") is None
