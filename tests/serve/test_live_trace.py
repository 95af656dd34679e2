"""The recorder of `mogul trace` works on a model that an engine serves, with the same record."""

import numpy as np
import torch

from mogul.models import load_model
from mogul.observe.tracer import Tracer
from mogul.serve import Engine, SamplingParams
from mogul.serve.options import EngineOptions

PROMPTS = ([5, 9, 2, 44, 17], [8, 8, 301, 7, 6, 5, 4], [100, 3])


def test_an_engine_is_traced_like_plain_forwards():
    model = load_model("nano", dtype=torch.float32, device="cpu").eval()
    with Tracer(model) as tracer, torch.no_grad():
        for prompt in PROMPTS:
            model(input_ids=torch.tensor([prompt]), use_cache=False)
        want = tracer.trace()
    engine = Engine(model, options=EngineOptions(max_length=64, step_tokens=4, max_sequences=2))
    try:
        with Tracer(model) as tracer:
            engine.generate(list(PROMPTS), SamplingParams(max_tokens=1, temperature=0))
            got = tracer.trace()
    finally:
        engine.close()
    assert got.meta.num_tokens == want.meta.num_tokens == sum(map(len, PROMPTS))
    assert np.array_equal(got.arrays["count"], want.arrays["count"])
