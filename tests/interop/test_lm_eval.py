"""lm-eval scores a local multiple-choice task, offline, exactly as our own scoring does."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from mogul.models import load_model

pytest.importorskip("datasets", reason="datasets is not installed")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

QUESTIONS = [
    {"question": f"Question {i}: what follows {word}?", "choices": choices, "answer": i % 3}
    for i, (word, choices) in enumerate(
        [
            ("day", ["night", "a very long answer indeed", "x"]),
            ("one", ["two", "three", "naïve"]),
            ("salt", ["pepper", "sugar", "sand"]),
            ("king", ["queen", "pawn", "rook"]),
        ]
    )
]
TASK = """
task: mogul_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def own_scores(model, tokenizer, question: str, choices: list[str]) -> list[float]:
    """Log-probability of each choice after the question, summed over its tokens."""
    scores = []
    for choice in choices:
        start = tokenizer(question, add_special_tokens=False)["input_ids"]
        whole = tokenizer(question + " " + choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        spots = range(len(start), len(whole))
        scores.append(float(sum(logits[i - 1, whole[i]] for i in spots)))
    return scores


def test_scores_equal_ours(exported, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=data))
    model = load_model(exported, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"),
        tasks=["mogul_local"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    samples = sorted(found["samples"]["mogul_local"], key=lambda sample: sample["doc_id"])
    for sample, asked in zip(samples, QUESTIONS, strict=True):
        theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
        ours = own_scores(model, tokenizer, asked["question"], asked["choices"])
        assert theirs == pytest.approx(ours, abs=1e-6)
        right += max(range(3), key=ours.__getitem__) == asked["answer"]
    assert found["results"]["mogul_local"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
