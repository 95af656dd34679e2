"""Calibration data: text files in, batches of token windows out, one task a window.

A `.jsonl` file has one object a line with "text" (or "messages") and, where tasks matter, "task";
any other file is one text whose task is the file's name. Windows hold whole sequences of one task;
the last one of a task is padded, and padding is not counted.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import read_json_line


@dataclass(frozen=True)
class Window:
    """One row of a batch."""

    ids: Int[np.ndarray, " L"]
    num_real: int
    task: int


@dataclass(frozen=True)
class Calibration:
    """Windows of all data, and what they are."""

    windows: Sequence[Window]
    tasks: tuple[str, ...]
    names: tuple[str, ...]
    """Files with the start of their hashes."""

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(window.num_real for window in self.windows)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids [B, L], number of real tokens [B], task [B]), tasks mixed evenly."""
        for first in range(0, len(self.windows), size):
            part = self.windows[first : first + size]
            longest = max(window.num_real for window in part)
            yield (
                np.stack([window.ids[:longest] for window in part]),
                np.array([window.num_real for window in part]),
                np.array([window.task for window in part]),
            )


def check_ids(data: Calibration, model: Any) -> None:
    """Refuse tokens and windows that are none of the model's: it would answer nonsense."""
    length = max((window.num_real for window in data.windows), default=0)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if length > context:
        raise ConfigError(
            f"windows of {length:,} tokens are longer than the model's context of {context:,}",
            fix=f"use --length {context} or less",
        )
    largest = max((int(window.ids.max()) for window in data.windows), default=0)
    known = len(model.get_input_embeddings().weight)
    if largest >= known:
        raise ConfigError(
            f"the tokenizer gave token {largest}, the model knows 0..{known - 1}",
            fix="put the model's own tokenizer beside it",
        )


def read_texts(file: Path) -> list[tuple[str, str]]:
    """(task, text) of every document of a file.

    Raises:
        ArtifactError: a missing, empty or damaged file, with its line.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {file}: {error}", fix="give a UTF-8 text file") from error
    if file.suffix != ".jsonl":
        texts = [(file.stem, content)]
    else:
        lines = enumerate(content.split("\n"), 1)
        texts = [_document(line, file, number) for number, line in lines if line.strip()]
    if not any(text.strip() for _, text in texts):
        raise ArtifactError(f"{file} holds no text", fix="give a file with some text")
    return texts


def _document(line: str, file: Path, number: int) -> tuple[str, str]:
    values = read_json_line(line, file, number, fix="mend the line")
    text = values.get("text") if isinstance(values, dict) else None
    messages = values.get("messages") if isinstance(values, dict) else None
    if text is None and isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        text = "\n".join(str(message.get("content", "")) for message in messages)
    if not isinstance(text, str):
        raise ArtifactError(
            f"{file}, line {number} has no text", fix='write {"text": "...", "task": "..."}'
        )
    return str(values.get("task") or file.stem), text


def calibration(
    sources: Mapping[str, Sequence[tuple[str, str]]],
    encode: Callable[[str], list[int]],
    *,
    length: int,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Cut all data into windows of `length` tokens, shuffled, `max_tokens` in all at most.

    Args:
        sources: (task, text) of every document, by the name of its file.
        encode: the tokenizer.
        length: tokens of a window.
        max_tokens: real tokens in all.
        seed: seed of the shuffle.

    Raises:
        ConfigError: a window shorter than two tokens.
    """
    if length < 2 or (max_tokens is not None and max_tokens < 1):
        raise ConfigError(
            f"windows of {length} tokens, {max_tokens} tokens in all: nothing to trace",
            fix="use at least 2 tokens a window and 1 in all",
        )
    stream: dict[str, list[int]] = defaultdict(list)
    names = []
    for name, documents in sources.items():
        digest = hashlib.sha256()
        for task, text in documents:
            digest.update(text.encode())
            if max_tokens is None or len(stream[task]) < max_tokens:  # more could not be used
                stream[task] += encode(text)
        names.append(f"{name}:{digest.hexdigest()[:12]}")
    tasks = tuple(stream)
    length = min(length, max(map(len, stream.values()), default=length))
    windows = [
        _window(ids[first : first + length], length, index)
        for index, ids in enumerate(stream.values())
        for first in range(0, len(ids), length)
    ]
    order = np.random.default_rng(seed).permutation(len(windows))
    return Calibration(_limited([windows[i] for i in order], max_tokens), tasks, tuple(names))


def _window(ids: list[int], length: int, task: int) -> Window:
    padded = np.zeros(length, dtype=np.int64)
    padded[: len(ids)] = ids
    return Window(padded, len(ids), task)


def _limited(windows: list[Window], max_tokens: int | None) -> list[Window]:
    if max_tokens is None:
        return windows
    kept, left = [], max_tokens
    for window in windows:
        if left <= 0:
            break
        kept.append(Window(window.ids, min(window.num_real, left), window.task))
        left -= window.num_real
    return kept


def position_major(num_real_B: np.ndarray, length: int) -> Int[np.ndarray, " N"]:
    """Rows of the real tokens of a batch [B, L], one position of all sequences after the other.

    So neighbouring tokens are of different sequences, as in a decode batch.
    """
    position_LB, sequence_LB = np.meshgrid(
        np.arange(length), np.arange(len(num_real_B)), indexing="ij"
    )
    is_real: Bool[np.ndarray, "L B"] = position_LB < num_real_B[sequence_LB]
    rows: Any = sequence_LB * length + position_LB
    return rows[is_real]
