import pytest

from mogul.core.errors import ArtifactError, ConfigError
from mogul.spec import hardware as hw
from mogul.spec.families import model_spec
from mogul.spec.parallel import Parallel
from mogul.spec.plan import Plan
from mogul.spec.presets import config
from mogul.spec.quant import QuantScheme, scheme
from mogul.spec.workload import Speculation, Workload


@pytest.mark.parametrize("name", hw.names())
def test_every_shipped_device_names_its_sources(name):
    device = hw.hardware(name)
    assert device.peak("bf16") > 1e12
    assert all(len(text) > 4 for text in device.sources.values())
    # Arithmetic per byte of every machine lies within what was ever built.
    assert 10 < device.peak("int8") / device.memory_bytes_per_s < 2000


def test_the_issue_names_these_devices():
    wanted = {"a100", "h100", "h800", "h200", "b200", "l40s", "rtx-4090", "mi300x"}
    wanted |= {"ascend-910b", "ascend-910c", "ascend-300i-duo", "cpu-avx512"}
    assert wanted <= set(hw.names())


def test_peak_falls_back_to_wider_arithmetic():
    assert hw.hardware("a100").peak("fp8") == hw.hardware("a100").peak("bf16")
    assert hw.hardware("h100").peak("fp4") == hw.hardware("h100").peak("fp8")


def test_unknown_device_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown device 'h1000'") as caught:
        hw.hardware("h1000")
    assert "'h100'" in caught.value.__notes__[0]


def test_a_users_file_extends_a_shipped_device(tmp_path):
    file = tmp_path / "my-h100.toml"
    file.write_text(
        'extends = "h100"\nmemory_bytes_per_s = 3.0e12\n[sources]\n'
        'memory_bytes_per_s = "measured copy"\n'
    )
    mine = hw.hardware(str(file))
    assert (mine.name, mine.memory_bytes_per_s) == ("my-h100", 3.0e12)
    assert mine.peak("bf16") == hw.hardware("h100").peak("bf16")
    assert mine.sources["memory_bytes_per_s"] == "measured copy"


def test_a_number_without_source_is_refused(tmp_path):
    shipped = (hw.DEVICE_DIR / "h100.toml").read_text()
    file = tmp_path / "bare.toml"
    file.write_text("\n".join(x for x in shipped.splitlines() if not x.startswith('"peak_flop')))
    with pytest.raises(ConfigError, match=r"no source is given for peak_flop_per_s\.bf16"):
        hw.hardware(str(file))


def test_unknown_key_and_missing_file(tmp_path):
    file = tmp_path / "typo.toml"
    file.write_text('extends = "h100"\nmemory_byte = 1.0\n')
    with pytest.raises(ConfigError, match="unknown key 'memory_byte'") as caught:
        hw.hardware(str(file))
    assert "memory_bytes" in caught.value.__notes__[0]
    with pytest.raises(ArtifactError, match="does not exist"):
        hw.hardware(str(tmp_path / "none.toml"))


def test_layouts_that_cannot_be():
    with pytest.raises(ConfigError, match="do not fill"):
        Parallel(tp=4, dp=2, ep=3, moe_tp=2)
    moe = model_spec(config("qwen3-30b-a3b"))
    with pytest.raises(ConfigError, match="tp=5 does not divide the 32 query heads"):
        Parallel(tp=5).check(moe)
    with pytest.raises(ConfigError, match=r"moe_tp=7 does not divide the expert width"):
        Parallel(dp=7, ep=1, moe_tp=7).check(moe)
    with pytest.raises(ConfigError, match="some would hold none"):
        Parallel(dp=256, ep=256).check(moe)


def test_the_papers_hybrid_layout():
    layout = Parallel(tp=4, dp=2, ep=4, moe_tp=2, shared_tp=8)
    assert (layout.devices, layout.expert_ranks, layout.expert_tp, layout.shared_ranks) == (
        8,
        4,
        2,
        8,
    )


def test_quantisation():
    assert scheme("w4a8").arithmetic("int4") == "int8"
    assert scheme("w4a16").arithmetic("int4") == "bf16"
    assert QuantScheme(weights="fp8_block").arithmetic("fp8_block") == "fp8"
    with pytest.raises(ConfigError, match="unknown quantisation 'w4a9'"):
        scheme("w4a9")
    with pytest.raises(ConfigError, match=r"quant\.kv='int7' is unknown"):
        QuantScheme(kv="int7")


def test_only_the_experts_of_w8a16_are_in_8_bits():
    found = scheme("fp8-w8a16")
    assert (found.weights, found.expert_format, found.kv) == ("bf16", "fp8-w8a16", "bf16")
    assert found.arithmetic(found.expert_format) == "fp8"


def test_speculation_counts_expected_tokens():
    assert Speculation(draft_tokens=1, acceptance=0.7).tokens_per_step == pytest.approx(1.7)
    assert Speculation(draft_tokens=2, acceptance=0.5).tokens_per_step == pytest.approx(1.75)


def test_a_plan_survives_its_file(tmp_path):
    plan = Plan(
        model="qwen3-30b-a3b", device="h100", parallel=Parallel(dp=2), quant=QuantScheme(),
        workload=Workload(batch=4), expected={"tpot_s": 0.01},
    )  # fmt: skip
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("name", hw.names())
def test_a_number_of_a_shipped_device_can_be_replaced(name):
    device = hw.hardware(name)
    faster = device.replace(memory_bytes_per_s=2 * device.memory_bytes_per_s)
    assert faster.memory_bytes_per_s == 2 * device.memory_bytes_per_s
    assert faster.replace(memory_bytes_per_s=device.memory_bytes_per_s) == device


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network_bytes_per_s": 0.0}, "network_bytes_per_s: Input should be greater than 0"),
        ({"launch_s": -1e-6}, "launch_s: Input should be greater than or equal to 0"),
        ({"network_latency_s": -1.0}, "network_latency_s: Input should be greater than or equal"),
        ({"peak_flop_per_s": {"bf16": 0.0}}, "bf16: Input should be greater than 0"),
        ({"peak_flop_per_s": {}}, "peak_flop_per_s: Dictionary should have at least 1"),
        ({"price_per_hour": -2.0}, "price_per_hour: Input should be greater than or equal to 0"),
    ],
)
def test_what_no_machine_has_is_refused(change, words):
    device = hw.hardware("h100")
    sources = device.sources | dict.fromkeys(change.keys() - {"peak_flop_per_s"}, "guess")
    with pytest.raises(ConfigError, match=words):
        device.replace(sources=sources, **change)
