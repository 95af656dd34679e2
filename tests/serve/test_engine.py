"""The engine says what Transformers says, in any company and whatever happens to its pages."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mogul.core.errors import BackendError, ConfigError
from mogul.serve import Engine, SamplingParams

GREEDY = SamplingParams(max_tokens=20, temperature=0)


def check_all(tiny, family, prompts, answers, count=20):
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.finish == "length"
        tiny.assert_greedy(family, prompt, answer.token_ids, count)


def run_checked(engine):
    """Step to the end, the books checked after every step."""
    answers = {}
    for _ in range(2000):
        if not engine.has_work:
            return answers
        answers |= {c.id: c.answer for c in engine.step() if c.answer is not None}
        engine.check()
    raise AssertionError("the engine never came to an end")


def test_every_family_says_what_transformers_says(tiny, any_family):
    prompts = tiny.prompts(3, 30, 11)
    answers = tiny.engine(any_family).generate(prompts, GREEDY)
    check_all(tiny, any_family, prompts, answers)


def test_alone_and_in_company(tiny, family):
    prompts = tiny.prompts(1, 7, 16, 33, 50, 2, 24)
    together = tiny.engine(family).generate(prompts, GREEDY)
    check_all(tiny, family, prompts, together)
    engine = tiny.engine(family)
    for prompt, answer in zip(prompts, together, strict=True):
        assert engine.generate([prompt], GREEDY)[0].token_ids == answer.token_ids


def test_prefix_hits_change_nothing(tiny, family):
    (shared,) = tiny.prompts(41)
    tails = tiny.prompts(5, 9, 1, seed=1)
    prompts = [shared + tail for tail in tails]
    engine = tiny.engine(family)
    first = engine.generate([shared], GREEDY)[0]
    answers = engine.generate([shared, *prompts], GREEDY)
    assert first.cached_tokens == 0
    assert answers[0].cached_tokens == 40
    assert all(answer.cached_tokens >= 40 for answer in answers[1:])
    check_all(tiny, family, [shared, *prompts], answers)
    again = engine.generate([shared + list(first.token_ids)], GREEDY)[0]
    assert again.cached_tokens >= 56, "tokens of an answer are known too"


def test_other_salts_and_switched_off_reuse_share_nothing(tiny):
    (prompt,) = tiny.prompts(41)
    engine = tiny.engine("llama")
    engine.generate([prompt], GREEDY)
    number = engine.add(prompt, GREEDY, salt="someone else")
    assert run_checked(engine)[number].cached_tokens == 0
    engine = tiny.engine("llama", reuse_prefix=False)
    engine.generate([prompt], GREEDY)
    assert engine.generate([prompt], GREEDY)[0].cached_tokens == 0


def test_requests_that_give_way_lose_nothing(tiny, family):
    prompts = tiny.prompts(20, 25, 30, 22)
    engine = tiny.engine(family, cache_tokens=92, reuse_prefix=False)
    numbers = [engine.add(prompt, GREEDY) for prompt in prompts]
    answers = run_checked(engine)
    assert engine.stats.num_preemptions > 0
    check_all(tiny, family, prompts, [answers[number] for number in numbers])


@pytest.mark.parametrize(("step_tokens", "page_size"), [(1, 1), (5, 3), (7, 16), (400, 8)])
def test_chunks_and_pages_of_any_size(tiny, step_tokens, page_size):
    prompts = tiny.prompts(1, 19, 37)
    engine = tiny.engine("moge", step_tokens=step_tokens, page_size=page_size)
    check_all(tiny, "moge", prompts, engine.generate(prompts, GREEDY))


def test_priorities_go_first(tiny):
    engine = tiny.engine("llama", max_sequences=1)
    (first, second, urgent) = tiny.prompts(8, 8, 8)
    params = SamplingParams(max_tokens=4, temperature=0)
    numbers = [engine.add(first, params), engine.add(second, params)]
    engine.step()
    numbers.append(engine.add(urgent, params, priority=-1))
    answers = run_checked(engine)
    ends = {n: answers[n].token_times_s[-1] for n in numbers}
    assert sorted(numbers, key=ends.__getitem__) == [numbers[0], numbers[2], numbers[1]]


def test_logprobs_are_those_of_one_plain_forward(tiny, family):
    prompts = tiny.prompts(40, 9)
    engine = tiny.engine(family)
    engine.generate(prompts, GREEDY)  # known pages must not shorten the prompt
    asked = SamplingParams(max_tokens=8, temperature=0, logprobs=3, prompt_logprobs=2)
    for prompt, answer in zip(prompts, engine.generate(prompts, asked), strict=True):
        assert answer.cached_tokens == 0
        tokens = [*prompt, *answer.token_ids]
        want = tiny.logprobs(family, tokens)
        assert answer.prompt_logprobs[0] is None
        assert len(answer.prompt_logprobs) == len(prompt)
        records = [*answer.prompt_logprobs[1:], *answer.logprobs]
        for i, record in enumerate(records):
            assert record.token == tokens[i + 1]
            assert record.logprob == pytest.approx(float(want[i, record.token]), abs=1e-4)
            top = want[i].topk(len(record.top))
            assert [p for _, p in record.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert {len(r.top) for r in answer.logprobs} == {3}
        assert {len(r.top) for r in answer.prompt_logprobs[1:]} == {2}


def test_a_prompt_of_one_token_has_one_entry_of_log_probabilities(tiny):
    asked = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0)
    short, long = tiny.engine("llama").generate([[3], [3, 4, 5]], asked)
    assert short.prompt_logprobs == (None,)
    assert len(long.prompt_logprobs) == 3
    assert tiny.engine("llama").generate([[3]], asked)[0].prompt_logprobs == (None,)


def test_routed_experts_are_the_routers_picks(tiny):
    engine = tiny.engine("moge")
    prompts = tiny.prompts(30, 8)
    engine.generate(prompts, GREEDY)
    asked = SamplingParams(max_tokens=6, temperature=0, routed_experts=True)
    for prompt, answer in zip(prompts, engine.generate(prompts, asked), strict=True):
        tokens = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        with torch.inference_mode():
            out = tiny.model("moge")(tokens, output_router_ids=True)
        want = torch.stack(out.router_ids, 1).sort(-1).values
        got = torch.from_numpy(answer.routed_experts).long().sort(-1).values
        assert torch.equal(got, want)


def test_a_seed_is_a_text_whoever_else_is_there(tiny):
    prompt, *others = tiny.prompts(12, 5, 30, 7)
    seeded = SamplingParams(max_tokens=15, seed=5)
    alone = tiny.engine("moge").generate([prompt], seeded)[0]
    engine = tiny.engine("moge", cache_tokens=64, step_tokens=9)
    together = engine.generate([prompt, *others], [seeded, *[SamplingParams(max_tokens=15)] * 3])
    assert together[0].token_ids == alone.token_ids
    other = SamplingParams(max_tokens=15, seed=6)
    assert engine.generate([prompt], other)[0].token_ids != alone.token_ids


def test_stop_tokens_and_ends_of_text(tiny):
    (prompt,) = tiny.prompts(10)
    whole = tiny.engine("llama").generate([prompt], GREEDY)[0].token_ids
    stop = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=(whole[5],))
    answer = tiny.engine("llama").generate([prompt], stop)[0]
    assert answer.finish == "stop"
    assert answer.token_ids == whole[: whole.index(whole[5]) + 1]


def test_streams_interleave_and_closing_one_aborts_it(tiny):
    engine = tiny.engine("qwen3_moe")
    prompts = tiny.prompts(6, 8)
    streams = [engine.stream(prompt, GREEDY) for prompt in prompts]
    said: list[list[int]] = [[], []]
    for _ in range(5):
        for tokens, stream in zip(said, streams, strict=True):
            tokens += next(stream).token_ids
    streams[1].close()
    assert engine.stats.num_running == 1
    for chunk in streams[0]:
        said[0] += chunk.token_ids
    tiny.assert_greedy("qwen3_moe", prompts[0], tuple(said[0]), 20)
    assert said[1] == tiny.expected("qwen3_moe", prompts[1], 20)[: len(said[1])]
    engine.check()
    assert engine.stats.free_pages + engine.stats.cached_pages == engine.stats.num_pages


def test_abort_frees_at_once_and_twice_is_harmless(tiny):
    engine = tiny.engine("llama")
    numbers = [engine.add(prompt, GREEDY) for prompt in tiny.prompts(9, 9, 9, 9, 9)]
    engine.step()
    assert engine.abort(numbers[0])
    assert engine.abort(numbers[4]), "one that still waits"
    assert not engine.abort(numbers[0])
    engine.check()
    answers = run_checked(engine)
    assert set(answers) == set(numbers[1:4])
    assert engine.take(numbers[0])[-1].answer.finish == "abort"


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 300, {}, "exceed the length of 256"),
        ([5000], {}, "holds token 5000"),
        ([119, -5], {}, "holds token -5"),
        ([1.5], {}, "neither text nor token ids"),
        (None, {}, "neither text nor token ids"),
        ("text", {}, "no tokenizer"),
        ([1], {"stop": ("x",)}, "stop strings need a tokenizer"),
    ],
)
def test_what_cannot_be_asked_is_refused(tiny, prompt, params, words):
    with pytest.raises(ConfigError, match=words):
        tiny.engine("llama").add(prompt, SamplingParams(**params))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"params": {"max_tokens": 3}}, "are no SamplingParams"),
        ({"priority": "first"}, "priority 'first' is no whole number"),
    ],
)
def test_a_request_of_another_kind_is_refused_and_leaves_the_engine_whole(tiny, asked, words):
    engine = tiny.engine("llama")
    with pytest.raises(ConfigError, match=words):
        engine.add([1, 2], **asked)
    engine.check()
    assert not engine.has_work
    assert len(engine.generate([[1, 2]], GREEDY)[0].token_ids) == 20


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_prompts_of_other_libraries_are_prompts(tiny, kind):
    engine = tiny.engine("llama")
    want = engine.generate([[5, 6, 7]], GREEDY)[0].token_ids
    for prompts in (kind([5, 6, 7]), [kind([5, 6, 7])]):
        assert [answer.token_ids for answer in engine.generate(prompts, GREEDY)] == [want]


@pytest.mark.parametrize("has_device", [False, True])
def test_attention_that_cannot_run_is_refused_when_the_engine_opens(tiny, monkeypatch, has_device):
    room = "mogul.kernels.triton.attention"
    if has_device:
        monkeypatch.setattr(f"{room}.why_not_triton_attention", lambda **_: None)
        monkeypatch.setattr(f"{room}.find_spec", lambda _: None)
    words = "not installed: pip install 'mogul.flashinfer.'" if has_device else "on cpu, not on"
    with pytest.raises(BackendError, match=f"FlashInfer cannot attend here: .*{words}") as caught:
        tiny.engine("llama", attention="flashinfer")
    assert caught.value.__notes__ == ['fix: leave attention at "auto"']


def test_routed_experts_of_a_dense_model_are_refused(tiny):
    with pytest.raises(BackendError, match="without experts"):
        tiny.engine("llama").add([1], SamplingParams(routed_experts=True))


def test_a_request_larger_than_the_cache_is_refused(tiny):
    engine = tiny.engine("llama", cache_tokens=20)
    with pytest.raises(ConfigError, match="exceed the length of 20"):
        engine.add([1] * 15, SamplingParams(max_tokens=6))
    assert len(engine.generate([[1] * 15], SamplingParams(max_tokens=5))[0].token_ids) == 5


@pytest.mark.parametrize("what", [{"logit_bias": {120: 1.0}}, {"stop_token_ids": (3, 120)}])
def test_token_ids_the_model_lacks_are_refused(tiny, what):
    engine = tiny.engine("llama")
    with pytest.raises(ConfigError, match="names token 120, the model knows"):
        engine.add([1], SamplingParams(**what))


def test_a_closed_engine_leaves_the_model_as_it_was(tiny):
    engine = tiny.engine("moge")
    model = engine.runner.model
    tokens = torch.tensor([tiny.prompts(9)[0]])
    with pytest.raises(BackendError, match="no engine runs it"):
        model(tokens)
    number = engine.add([1, 2, 3], GREEDY)
    engine.step()
    engine.close()
    assert engine.take(number)[-1].answer.finish == "abort"
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, tiny.model("moge")(tokens).logits)


def test_a_closed_engine_refuses_more_work(tiny):
    engine = tiny.engine("llama")
    engine.close()
    engine.close()
    for more in (engine.step, lambda: engine.add([1]), lambda: engine.generate([[1]], GREEDY)):
        with pytest.raises(ConfigError, match="engine is closed"):
            more()


@pytest.mark.timeout(60)
def test_closing_from_another_thread_ends_those_who_wait(tiny):
    engine = tiny.engine("llama")
    chunks = engine.stream([1, 2, 3], SamplingParams(max_tokens=200, temperature=0))
    assert next(chunks).answer is None
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join()
    assert list(chunks)[-1].answer.finish == "abort"


def test_two_engines_share_a_model_until_both_are_closed(tiny):
    older = tiny.engine("moge")
    model = older.runner.model
    newer = Engine(model, None, older.options)
    prompts = tiny.prompts(5, 9)
    older.close()
    check_all(tiny, "moge", prompts, newer.generate(prompts, GREEDY))
    newer.close()
    assert model.config._attn_implementation == "sdpa"
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.timeout(120)
def test_engines_in_two_threads_do_not_mix_their_steps(tiny):
    names = ("llama", "moge")
    engines = [tiny.engine(name) for name in names]
    prompts = tiny.prompts(5, 9, 14)

    def wait(*_):
        time.sleep(0.002)  # every layer lets the other thread in

    for engine in engines:
        for layer in engine.runner.model.model.layers:
            layer.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda engine: engine.generate(prompts, GREEDY), engines))
    for name, own in zip(names, answers, strict=True):
        check_all(tiny, name, prompts, own)


def test_an_engine_that_fails_to_open_leaves_the_model_as_it_was(tiny, monkeypatch):
    model = copy.deepcopy(tiny.model("llama"))
    for place in ("mogul.serve.engine.choose_sizes", "mogul.serve.runner.find_layers"):
        monkeypatch.setattr(place, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Engine(model)
        assert model.config._attn_implementation == "sdpa"
        assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_outside_the_interface_is_refused_with_the_reason():
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(BackendError, match="Transformers"):
        Engine(AutoModelForCausalLM.from_config(config).eval())
