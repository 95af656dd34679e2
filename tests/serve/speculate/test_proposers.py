"""Draft model and MTP layer in the engine: no token changes, and good guesses stand."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mogul.models  # noqa: F401
from mogul.core.errors import ArtifactError, ConfigError
from mogul.models.quantise_load import packed_format
from mogul.models.quantised_write import quantise_checkpoint
from mogul.serve import Engine, SamplingParams
from mogul.serve.options import EngineOptions
from mogul.serve.runner import Runner
from mogul.serve.sizes import _free_bytes, choose_sizes, work_bytes_a_token
from mogul.serve.speculate import DraftLength, NgramProposer, Speculator, make_speculator
from mogul.serve.speculate.draft_model import DraftModelProposer
from mogul.serve.speculate.mtp import MtpProposer

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "router_n_groups": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "initializer_range": 0.3,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def make_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("moge", **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).float().eval()


def prompts(count: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (5 + 9 * i,), generator=generator).tolist() for i in range(count)]


def generate(
    model: Any, params: list[SamplingParams], proposer: Any = None, **options: Any
) -> tuple[list[tuple[int, ...]], Speculator | None]:
    """Tokens of all prompts together."""
    settled = {
        "max_sequences": 4,
        "step_tokens": 24,
        "cache_tokens": 400,
        "page_size": 4,
        "seed": 0,
    }
    speculator = Speculator(proposer, DraftLength(3, fixed=True)) if proposer else None
    engine = Engine(
        copy.deepcopy(model), None, EngineOptions(**{**settled, **options}), speculator=speculator
    )
    answers = engine.generate(prompts(len(params)), params)
    engine.check()
    engine.close()
    return [answer.token_ids for answer in answers], speculator


KINDS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=1, max_tokens=20, seed=3),
    SamplingParams(temperature=0.7, top_p=0.8, max_tokens=20, seed=4),
    SamplingParams(temperature=1, frequency_penalty=0.5, max_tokens=20, seed=5),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def plain(model: Any) -> list[tuple[int, ...]]:
    return generate(model, KINDS)[0]


@pytest.mark.parametrize("options", [{}, {"cache_tokens": 110}, {"step_tokens": 6}])
@pytest.mark.parametrize("kind", ["draft", "mtp", "chain"])
def test_tokens_are_those_of_plain_decoding(
    model: Any, plain: list[tuple[int, ...]], kind: str, options: dict[str, Any]
) -> None:
    """Also where requests give way to each other and where prompts come in chunks."""
    if kind == "draft":
        proposer: Any = DraftModelProposer(make_model(hidden_size=16))
    else:
        proposer = MtpProposer(follow=kind == "chain")
    found, speculator = generate(model, KINDS, proposer, **options)
    assert found == plain
    assert speculator is not None
    assert speculator.stats.drafted[0] > 10


def test_the_model_as_its_own_draft_is_always_right(
    model: Any, plain: list[tuple[int, ...]]
) -> None:
    """Nothing of its cache is lost or wrong, whatever stood, fell, or was preempted."""
    for options in ({}, {"cache_tokens": 110}, {"step_tokens": 6}):
        proposer = DraftModelProposer(copy.deepcopy(model))
        found, speculator = generate(model, KINDS, proposer, **options)
        assert found == plain
        assert speculator is not None
        assert speculator.stats.acceptance == (1.0, 1.0, 1.0)


def kept_guesses(monkeypatch) -> list[tuple[list[int], list[int]]]:
    """Every text that was guessed for, with its guesses."""
    seen: list[tuple[list[int], list[int]]] = []
    propose = MtpProposer.propose

    def keep(self, requests, counts):
        guesses = propose(self, requests, counts)
        seen.extend((list(one.tokens), g) for one, g in zip(requests, guesses, strict=True) if g)
        return guesses

    monkeypatch.setattr(MtpProposer, "propose", keep)
    return seen


@pytest.mark.parametrize("follow", [False, True])
def test_pages_in_fp8_are_the_models_alone(model: Any, follow: bool) -> None:
    """Values far above what e4m3 holds at scale 1 cut nothing off in the layer's own pages."""
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.model.layers[2].self_attn.v_proj.weight.mul_(3e4)
        loud.model.layers[2].self_attn.o_proj.weight.div_(3e4)
    params = [SamplingParams(temperature=0, max_tokens=20)] * 4
    told = []
    for kv_dtype in ("auto", "fp8"):
        for one in (model, loud):
            proposer = MtpProposer(follow=follow)
            found, speculator = generate(one, params, proposer, kv_dtype=kv_dtype)
            assert speculator is not None
            told.append((found, speculator.stats.accepted))
    assert told[0] == told[1]
    assert told[2] == told[3]


@pytest.mark.parametrize("options", [{"step_tokens": 7}, {"cache_tokens": 110}])
@pytest.mark.parametrize("follow", [False, True])
def test_the_layer_is_fed_as_in_one_whole_forward(
    model: Any, monkeypatch, follow: bool, options: dict[str, Any]
) -> None:
    """Guesses equal the layer's own over the whole text, however it came in pieces."""
    seen = kept_guesses(monkeypatch)
    params = [SamplingParams(temperature=0, max_tokens=14)] * 4
    generate(model, params, MtpProposer(follow=follow), **options)
    assert len(seen) > 20
    assert max(len(guesses) for _, guesses in seen) == 3
    reference = copy.deepcopy(model)
    for tokens, guesses in seen:
        with torch.inference_mode():
            hidden = reference.model(torch.tensor([tokens[:-1]])).last_hidden_state
            for guess in guesses:
                out = reference.mtp_hidden(hidden, torch.tensor([tokens[1:]]))
                assert int(reference.lm_head(out)[0, -1].argmax()) == guess
                hidden, tokens = torch.cat((hidden, out[:, -1:]), 1), [*tokens, guess]


def test_the_device_guesses_on_without_the_host(model: Any, monkeypatch) -> None:
    """After the first guesses the chain makes all others; not where tokens are drawn by chance."""
    alone: list[int] = []
    step_by_step = MtpProposer._propose

    def count(self, live, counts):
        alone.extend(one.id for one in live)
        return step_by_step(self, live, counts)

    monkeypatch.setattr(MtpProposer, "_propose", count)
    seen = kept_guesses(monkeypatch)
    params = [SamplingParams(temperature=0, max_tokens=30)] * 4
    generate(model, params, MtpProposer(follow=True), step_tokens=200)
    assert len(seen) > 60
    assert len(alone) <= 8
    del alone[:], seen[:]
    drawn = [SamplingParams(temperature=1, max_tokens=10, seed=i) for i in range(4)]
    generate(model, drawn, MtpProposer(follow=True))
    assert len(alone) == len(seen), "guesses for drawn tokens share the model's random numbers"


def test_an_engine_that_fails_to_open_gives_back_what_the_guesser_took(
    model: Any, monkeypatch
) -> None:
    broken = copy.deepcopy(model)
    small = make_model(hidden_size=16)
    monkeypatch.setattr("mogul.serve.runner.Runner.warm_up", lambda *_: 1 / 0)
    monkeypatch.setattr(DraftModelProposer, "attach", lambda self, _: setattr(self, "seen", 1))
    for proposer in (MtpProposer(), DraftModelProposer(small)):
        with pytest.raises(ZeroDivisionError):
            Engine(broken, None, speculator=Speculator(proposer, DraftLength(2)))
    assert not broken.model.norm._forward_hooks
    assert small.config._attn_implementation == broken.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("follow", [False, True])
def test_closing_gives_the_pages_of_the_layer_back(model: Any, follow: bool) -> None:
    proposer = MtpProposer(follow=follow)
    speculator = Speculator(proposer, DraftLength(2, fixed=True))
    options = EngineOptions(max_sequences=2, step_tokens=24, cache_tokens=100, page_size=4)
    engine = Engine(copy.deepcopy(model), None, options, speculator=speculator)
    engine.generate(prompts(2), KINDS[0])
    pages = weakref.ref(proposer._cache.key)
    engine.close()
    gc.collect()
    assert pages() is None


def test_another_vocabulary_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="knows 40 tokens, the model 61") as caught:
        generate(model, KINDS, DraftModelProposer(make_model(vocab_size=40)))
    assert caught.value.__notes__ == ["fix: take a draft with the same tokenizer"]


def test_a_model_without_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no multi-token-prediction layer"):
        generate(make_model(), KINDS, MtpProposer())


def test_large_drafts_are_warned_of(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    generate(model, KINDS[:1], DraftModelProposer(copy.deepcopy(model)))
    assert "it will seldom pay" in caplog.text


@pytest.mark.parametrize("where", ["propose", "observe", "follow"])
@pytest.mark.parametrize("after", [1, 7])
def test_a_guesser_that_breaks_is_given_up_and_no_request_ends(
    model: Any,
    plain: list[tuple[int, ...]],
    monkeypatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    after: int,
) -> None:
    proposer = MtpProposer(follow=True)
    sound, calls = getattr(proposer, where), []

    def breaks(*given: Any) -> Any:
        calls.append(1)
        if len(calls) >= after:
            raise torch.OutOfMemoryError("no room to guess")
        return sound(*given)

    monkeypatch.setattr(proposer, where, breaks)
    found, speculator = generate(model, KINDS, proposer)
    assert found == plain
    assert speculator is not None
    assert speculator.has_failed
    assert len(calls) == after, "it is never asked again"
    assert caplog.text.count("guessing is given up: OutOfMemoryError: no room to guess") == 1


def test_guesses_that_cannot_be_read_have_fallen(
    model: Any, plain: list[tuple[int, ...]], monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on an accelerator, where guesses are verified before the host knows their ids."""
    proposer, calls = MtpProposer(follow=True), []

    def breaks(guesses: Any) -> Any:
        calls.append(guesses)
        raise RuntimeError("the device is lost")

    def unread(_requests: Any, counts: list[int]) -> list[list[int]]:
        return [[-1 - i for i in range(count)] for count in counts]

    monkeypatch.setattr(proposer, "propose", unread)
    monkeypatch.setattr(proposer, "settle", breaks)
    found, speculator = generate(model, KINDS, proposer)
    assert found == plain
    assert speculator is not None
    assert speculator.has_failed
    assert len(calls) == 1
    assert "guessing is given up: RuntimeError: the device is lost" in caplog.text


@pytest.mark.parametrize("kind", ["mtp", "draft", "ngram"])
def test_a_guessers_pages_are_counted_where_memory_is_shared_out(model: Any, kind: str) -> None:
    runner = Runner(copy.deepcopy(model))
    layer = runner.token_bytes // len(runner.shapes)
    draft = make_model(num_hidden_layers=1)
    proposer, own = {
        "mtp": lambda: (MtpProposer(), layer),
        "draft": lambda: (DraftModelProposer(draft), layer),
        "ngram": lambda: (NgramProposer(), 0),
    }[kind]()
    speculator = Speculator(proposer, DraftLength(3))
    assert speculator.token_bytes(runner) == own
    options = EngineOptions(max_length=2**24, max_sequences=64)
    alone, beside = (choose_sizes(runner, options, one) for one in (None, speculator))
    room = 2 * 2**30
    for sizes, bytes_a_token in ((alone, 2 * layer), (beside, 2 * layer + own)):
        used = sizes.num_pages * sizes.page_size * bytes_a_token
        assert room - sizes.page_size * bytes_a_token < used <= room
    proposer.close()
    runner.close()


@pytest.mark.parametrize("prompt_sizes", [(), (64, 2048)])
def test_a_guessers_work_is_counted_where_memory_is_shared_out(
    model: Any, monkeypatch: pytest.MonkeyPatch, prompt_sizes: tuple[int, ...]
) -> None:
    """On an accelerator: a draft model captures steps with prompts, too, in memory of its own."""
    runner = Runner(copy.deepcopy(model))
    proposers = {
        "mtp": MtpProposer(),
        "small": DraftModelProposer(make_model(num_hidden_layers=1, hidden_size=32)),
        "draft": DraftModelProposer(make_model(num_hidden_layers=1)),
        "wide": DraftModelProposer(make_model(num_hidden_layers=1, intermediate_size=4096)),
        "ngram": NgramProposer(),
    }
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (8 << 30, 10 << 30))
    options = EngineOptions(max_sequences=64, prompt_sizes=prompt_sizes)
    steps, captured = 4096, max(prompt_sizes, default=0)
    own = work_bytes_a_token(runner)
    free = _free_bytes(runner, options, steps, None)
    assert free == (8 << 30) - (1 - options.memory_share) * (10 << 30) - (steps + captured) * own
    taken = {}
    for name, proposer in proposers.items():
        speculator = Speculator(proposer, DraftLength(3))
        taken[name] = free - _free_bytes(runner, options, steps, speculator)
        if isinstance(proposer, DraftModelProposer):
            a_token = work_bytes_a_token(proposer.runner)
            assert taken[name] == captured * a_token + steps * max(0, a_token - own)
        proposer.close()
    assert taken["ngram"] == 0
    assert taken["mtp"] == steps * runner.model.config.hidden_size * 4
    assert taken["wide"] > taken["draft"] >= taken["small"]
    runner.close()


def test_ranks_do_not_give_up_one_by_one(model: Any, monkeypatch) -> None:
    speculator = Speculator(MtpProposer(), DraftLength(3, fixed=True))
    speculator.length.agree = list
    monkeypatch.setattr(speculator.proposer, "observe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speculator.observe([])


def test_an_unknown_name_says_what_guesses_there_are():
    with pytest.raises(ArtifactError, match="foo does not exist") as caught:
        make_speculator("foo")
    assert "by ngram, by mtp, or by the folder" in " ".join(caught.value.__notes__)


def test_a_draft_model_may_be_a_checkpoint_in_fp8(tiny, tmp_path):
    model = copy.deepcopy(tiny.model("llama"))
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "source")
    quantise_checkpoint(tmp_path / "source", tmp_path / "fp8")
    proposer: Any = make_speculator(str(tmp_path / "fp8")).proposer
    assert packed_format(proposer.runner.model) == "fp8"
