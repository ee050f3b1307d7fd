# SPDX-License-Identifier: Apache-2.0
"""Run a GGUF file in llama.cpp, as far as the check of an export needs it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..engines.llama_library import LlamaContext, LlamaModel

__all__ = ["greedy", "is_installed"]

_MOST_ROWS = 512


def is_installed() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def greedy(path: Path, parts: Sequence[Sequence[int] | np.ndarray], count: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Continue a prompt greedily, with keys and values in float32 and without flash attention.

    Args:
        path: of a GGUF file.
        parts: of the prompt: token ids, or float32 embeddings (tokens, hidden).
        count: number of new tokens, at least 1.

    Returns:
        logits of the prompt's last token (vocabulary), and the new token ids.

    Raises:
        ImportError: llama-cpp-python is not installed.
        RuntimeError: llama.cpp does not load or run the file.
    """
    model = LlamaModel(path)
    tokens = sum(len(part) for part in parts) + count
    threads = torch.get_num_threads()
    context = LlamaContext(model, tokens=tokens, sequences=1, rows=_MOST_ROWS, threads=threads, exact=True)
    try:
        run = _Run(context)
        for part in parts:
            run.append(part)
        first = run.logits()
        answer = [int(first.argmax())]
        while len(answer) < count:
            run.append(answer[-1:])
            answer.append(int(run.logits().argmax()))
    finally:
        context.close()
        model.close()
    return first, tuple(answer)


class _Run:
    """One sequence in a context."""

    def __init__(self, context: LlamaContext) -> None:
        self._context, self._length, self._last = context, 0, -1

    def append(self, part: Sequence[int] | np.ndarray) -> None:
        """Run token ids or embeddings, in as many calls as their number needs."""
        for start in range(0, len(part), self._context.rows):
            rows = np.asarray(part[start : start + self._context.rows])
            positions = np.arange(self._length, self._length + len(rows))
            inputs = {"embeddings" if rows.ndim == 2 else "ids": rows}
            last = positions == positions[-1]
            if not self._context.decode(np.zeros(len(rows), int), positions, last, **inputs):
                raise RuntimeError(f"llama.cpp's cache is full: {len(rows)} tokens do not fit after {self._length}.")
            self._length, self._last = self._length + len(rows), len(rows) - 1

    def logits(self) -> np.ndarray:
        """Return the logits of the last token that was run."""
        return self._context.logits(self._last).copy()
