"""`mogul generate` streams what the model says to standard output, and nothing else."""

import functools
import io
import signal
import subprocess
import sys
import time

import pytest

from mogul.cli.main import main
from mogul.core.errors import ArtifactError
from mogul.serve.engine import Engine


def generate(capsys, *args: object) -> tuple[int, str, str]:
    code = main(["generate", *map(str, args)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def reference(checkpoint, prompt: str, num_tokens: int) -> str:
    """What plain Transformers says, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=1,
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_generation_config_of_words_is_named():
    from transformers import GenerationConfig

    from mogul.cli.generation import Sampling, sampling_params

    config = GenerationConfig()
    config.temperature = "hot"
    with pytest.raises(ArtifactError, match=r"temperature of the checkpoint's .* is 'hot'"):
        sampling_params(config, Sampling(8))


def test_the_continuation_alone_goes_to_stdout(capsys, checkpoint):
    code, out, err = generate(
        capsys, checkpoint, "--prompt", "the router", "--max-new-tokens", 12, "--temperature", 0
    )
    assert code == 0
    assert out == reference(checkpoint, "the router", 12) + "\n"
    assert "parameters in float32 on cpu" in err
    assert "greedy" in err
    assert "12 tokens in" in err
    assert "Warning" not in err


def test_one_answer_does_not_wait_for_prompts_to_be_captured(capsys, checkpoint, monkeypatch):
    seen = []
    plain = Engine.__init__

    def watched(self, model, tokenizer, options):
        seen.append(options)
        plain(self, model, tokenizer, options)

    monkeypatch.setattr(Engine, "__init__", watched)
    generate(capsys, checkpoint, "--prompt", "a", "--max-new-tokens", 1)
    assert [options.captured_prompts for options in seen] == [()]


def test_the_prompt_may_come_from_stdin(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the router\n"))
    code, out, _ = generate(capsys, checkpoint, "--prompt", "-", "--max-new-tokens", 12)
    assert code == 0
    assert out == reference(checkpoint, "the router", 12) + "\n"


def test_sampling_follows_its_seed(capsys, checkpoint):
    def sample(seed: int) -> str:
        args = ("--temperature", 1.5, "--top-p", 0.99, "--top-k", 0, "--seed", seed)
        code, out, err = generate(
            capsys, checkpoint, "--prompt", "a", "--max-new-tokens", 16, *args
        )
        assert code == 0
        assert "temperature 1.5, top-p 0.99, top-k 0" in err
        return out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_chat_wraps_the_prompt_in_the_template(capsys, checkpoint):
    code, out, _ = generate(
        capsys, checkpoint, "--prompt", "what?", "--chat", "--max-new-tokens", 8
    )
    assert code == 0
    assert out == reference(checkpoint, "<s>user what?</s><s>assistant ", 8) + "\n"


def test_experts_and_dtype_are_passed_on(capsys, checkpoint):
    args = ("--prompt", "a", "--max-new-tokens", 2, "--experts", "eager", "--dtype", "bf16")
    code, _, err = generate(capsys, checkpoint, *args)
    assert code == 0
    assert "bfloat16" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens 0 asks for nothing"),
        (("--prompt", "a", "--temperature", -1), "below 0"),
        (("--prompt", "a", "--top-p", 1.5), "is no share"),
        (("--prompt", "a", "--top-k", -2), "below 0"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--max-new-tokens", 70000), "exceed the model's context of 65536"),
    ],
)
def test_what_cannot_be_asked_is_refused(capsys, checkpoint, args, words):
    code, out, err = generate(capsys, checkpoint, *args)
    assert (code, out) == (2, "")
    assert words in err
    assert "fix: " in err


def test_a_family_without_pages_speaks_through_transformers(capsys, sink_checkpoint):
    import mogul.models  # noqa: F401  registers the family

    code, out, err = generate(
        capsys, sink_checkpoint, "--prompt", "the router", "--max-new-tokens", 12
    )
    assert code == 0
    assert "cannot show the 2 sink keys to every query" in err
    assert "token by token through Transformers instead" in err
    assert out == reference(sink_checkpoint, "the router", 12) + "\n"


def test_a_base_model_has_no_chat(capsys, base_checkpoint):
    few = ("--max-new-tokens", 1)
    code, _, err = generate(capsys, base_checkpoint, "--prompt", "a", "--chat", *few)
    assert code == 1
    assert "no chat template: this is a base model" in err
    assert generate(capsys, base_checkpoint, "--prompt", "a", *few)[0] == 0


def test_a_missing_folder_is_a_clear_error(capsys, tmp_path):
    code, out, err = generate(capsys, tmp_path / "nothing", "--prompt", "a")
    assert (code, out) == (1, "")
    assert "does not exist" in err


def test_words_arrive_as_they_are_said_and_ctrl_c_ends_cleanly(endless_checkpoint):
    command = [
        *(sys.executable, "-m", "mogul.cli.main", "generate", str(endless_checkpoint)),
        *("--prompt", "the", "--max-new-tokens", "60000", "--temperature", "1.0", "--top-k", "0"),
    ]
    # a shell's background jobs are born deaf to SIGINT, and so would be this one
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear) as process:
        first = process.stdout.read(20)
        assert process.poll() is None, "the first words came only with the last"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert len(first) == 20
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
