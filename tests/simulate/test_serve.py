import pytest

from mogul.core.errors import ArtifactError, ConfigError
from mogul.schedule.policy import Limits, Request, StepPlan
from mogul.simulate.run import Setting, predict
from mogul.simulate.serve import Arrival, StepCosts, poisson, read_arrivals, serve
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.parallel import Parallel
from mogul.spec.presets import config
from mogul.spec.workload import Workload

QWEN = model_spec(config("qwen3-30b-a3b"))
H200 = hardware("h200")


def test_one_request_alone_takes_its_prompt_and_its_steps():
    served = serve(Setting(QWEN, H200), [Arrival(0.0, 1024, 33)])
    point = predict(Setting(QWEN, H200), Workload(input_tokens=1024, output_tokens=33, batch=1))
    assert served.ttft_s[0] == pytest.approx(point.prefill.seconds, rel=0.1)
    assert served.tpot_s[0] == pytest.approx(point.decode.seconds, rel=0.1)
    assert served.output_tokens == 33


def test_a_steady_stream_agrees_with_the_closed_form():
    """A closed loop of B requests and B requests refilled at once are the same thing."""
    setting = Setting(QWEN, H200)
    arrivals = [Arrival(0.0, 512, 128) for _ in range(320)]
    served = serve(setting, arrivals, Limits(sequences=32, step_tokens=512))
    point = predict(setting, Workload(input_tokens=512, output_tokens=128, batch=32))
    middle = served.percentiles("tpot_s")[0]
    assert middle == pytest.approx(point.tpot_s, rel=0.2)


def test_more_load_waits_longer():
    setting = Setting(QWEN, H200)
    calm = serve(setting, poisson(1, 40, 1024, 64))
    busy = serve(setting, poisson(200, 200, 1024, 64), Limits(sequences=16))
    assert busy.percentiles("ttft_s")[2] > 3 * calm.percentiles("ttft_s")[2]
    assert len(busy.latency_s) == 200


def test_copies_share_the_load():
    arrivals = poisson(100, 60, 512, 32)
    one = serve(Setting(QWEN, H200), arrivals, Limits(sequences=8))
    two = serve(Setting(QWEN, H200, Parallel(dp=2)), arrivals, Limits(sequences=8))
    assert two.end_s < one.end_s


def test_traces_are_checked(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"arrival_s": 0, "input_tokens": 5, "output_tokens": 2}\n\n')
    assert read_arrivals(file) == [Arrival(0, 5, 2)]
    file.write_text('{"arrival_s": 0, "input_token": 5, "output_tokens": 2}\n')
    with pytest.raises(ArtifactError, match="line 1 is no request"):
        read_arrivals(file)
    for changes, words in (
        ('"arrival_s": NaN, "input_tokens": 5', "a request at nan seconds"),
        ('"arrival_s": -1, "input_tokens": 5', "a request at -1 seconds"),
        ('"arrival_s": 0, "input_tokens": 5.5', "a request of 5.5 input tokens"),
        ('"arrival_s": 0, "input_tokens": 5, "cached_prefix": -1', "-1 cached ones"),
    ):
        file.write_text(f'{{{changes}, "output_tokens": 2}}\n')
        with pytest.raises(ArtifactError, match=f"line 1: {words}|line 1: .* and {words}"):
            read_arrivals(file)
    with pytest.raises(ConfigError, match="no room for one request"):
        serve(Setting(QWEN, hardware("rtx-4090")), [Arrival(0, 5, 2)])


def test_the_price_of_prompts_does_not_depend_on_what_was_priced_before():
    """8,192 tokens of one prompt attend to far more than those of 64 prompts."""

    def seconds(costs, count):
        prompts = [(Request(i, 8192 // count, 1), 8192 // count) for i in range(count)]
        return costs.seconds(StepPlan(prompts=prompts), 0.0)

    setting = Setting(QWEN, hardware("h100"))
    fresh = {n: seconds(StepCosts(setting.step_model()), n) for n in (1, 64)}
    assert fresh[1] > 1.05 * fresh[64]
    for order in ((1, 64), (64, 1)):
        costs = StepCosts(setting.step_model())
        assert {n: seconds(costs, n) for n in order} == fresh
