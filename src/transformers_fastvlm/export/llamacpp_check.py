# SPDX-License-Identifier: Apache-2.0
"""Running and quantizing GGUF files with llama.cpp's library, through the C interface in llama-cpp-python.

llama.cpp ends the process at a failed assertion, so what it is given is checked here first.
"""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._optional import needs

__all__ = ["INSTALL", "greedy", "is_installed", "library", "quantize_file", "tokenize"]

INSTALL = 'pip install "transformers-fastvlm[llamacpp]"'
_FLOAT32 = 0  # of ggml's types
_BATCH = 512
_WARNING, _ERROR = 3, 4  # of ggml's log


def is_installed() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def library(why: str) -> Any:
    """Return the module with llama.cpp's C functions.

    Args:
        why: what needs it, as the subject of a sentence.

    Raises:
        ImportError: llama-cpp-python is not installed or cannot be imported.
    """
    # A failed assertion would otherwise start a debugger where one is installed.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    with needs("llama-cpp-python", why, INSTALL):
        import llama_cpp.llama_cpp as functions
    return functions


@contextlib.contextmanager
def _log(functions: Any) -> Iterator[list[str]]:
    """Collect warnings and errors of llama.cpp, which would go to standard error, and yield the list."""
    lines: list[str] = []
    last = 0

    def take(level: int, text: bytes, data: Any) -> None:
        nonlocal last
        last = level if level <= _ERROR else last  # 5 continues a line
        if last in (_WARNING, _ERROR):
            lines.append(text.decode("utf-8", "replace").strip())

    callback = functions.llama_log_callback(take)
    before, data = functions.llama_log_callback(), ctypes.c_void_p()
    functions.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    functions.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        functions.llama_log_set(before, data)


@contextlib.contextmanager
def _model(functions: Any, path: Path) -> Iterator[tuple[Any, list[str]]]:
    """Load a file on the CPU, and yield the model and the lines of the log."""
    with _log(functions) as lines:
        parameters = functions.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # The plain layout of weights: in the layouts for some CPUs they are multiplied less exactly, and llama.cpp of
        # llama-cpp-python 0.3.36 crashes on 8-bit weights in the one for AMX.
        parameters.use_extra_bufts = False
        functions.llama_backend_init()
        model = functions.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path.name}: {' '.join(lines)[-500:]}")
        try:
            yield model, lines
        finally:
            functions.llama_model_free(model)


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
    functions = library("Running a GGUF file")
    with _model(functions, path) as (model, lines):
        context = functions.llama_init_from_model(model, _context_parameters(functions, parts, count))
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {path.name}: {' '.join(lines)[-500:]}")
        try:
            run = _Run(functions, model, context, lines)
            for part in parts:
                run.append(part)
            first = run.logits()
            answer = [int(first.argmax())]
            while len(answer) < count:
                run.append(answer[-1:])
                answer.append(int(run.logits().argmax()))
        finally:
            functions.llama_free(context)
    return first, tuple(answer)


def _context_parameters(functions: Any, parts: Sequence[Any], count: int) -> Any:
    parameters = functions.llama_context_default_params()
    parameters.n_ctx = sum(len(part) for part in parts) + count
    parameters.n_batch = parameters.n_ubatch = _BATCH
    parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
    parameters.type_k = parameters.type_v = _FLOAT32
    parameters.flash_attn_type = functions.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.offload_kqv = False
    return parameters


class _Run:
    """One sequence in a context."""

    def __init__(self, functions: Any, model: Any, context: Any, lines: list[str]) -> None:
        self._functions, self._context, self._lines = functions, context, lines
        self._hidden = functions.llama_model_n_embd(model)
        self._vocabulary = functions.llama_vocab_n_tokens(functions.llama_model_get_vocab(model))
        self._length = 0

    def append(self, part: Sequence[int] | np.ndarray) -> None:
        """Run token ids or embeddings, in as many calls as their number needs."""
        for start in range(0, len(part), _BATCH):
            self._decode(part[start : start + _BATCH])

    def logits(self) -> np.ndarray:
        """Return the logits of the last token that was run."""
        values = self._functions.llama_get_logits_ith(self._context, -1)
        return np.array(np.ctypeslib.as_array(values, (self._vocabulary,)))

    def _decode(self, part: Sequence[int] | np.ndarray) -> None:
        functions, number = self._functions, len(part)
        batch = functions.llama_batch()
        batch.n_tokens = number
        if isinstance(part, np.ndarray):
            if part.shape[1] != self._hidden:
                raise ValueError(f"Embeddings have {part.shape[1]} channels; the GGUF file has {self._hidden}.")
            values = np.ascontiguousarray(part, np.float32)
            batch.embd = _pointer(values, ctypes.c_float)
        else:
            values = np.asarray(part, np.int32)
            batch.token = _pointer(values, functions.llama_token)
        positions = np.arange(self._length, self._length + number, dtype=np.int32)
        ones, wanted = np.ones(number, np.int32), np.zeros(number, np.int8)
        wanted[-1] = 1
        sequence = (functions.llama_seq_id * 1)(0)
        kind = ctypes.POINTER(functions.llama_seq_id)
        sequences = (kind * number)(*[ctypes.cast(sequence, kind)] * number)
        batch.pos = _pointer(positions, functions.llama_pos)
        batch.n_seq_id = _pointer(ones, ctypes.c_int32)
        batch.seq_id = ctypes.cast(sequences, ctypes.POINTER(kind))
        batch.logits = _pointer(wanted, ctypes.c_int8)
        status = functions.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama.cpp returns {status} for {number} tokens: {' '.join(self._lines)[-500:]}")
        self._length += number


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def quantize_file(source: Path, path: Path, file_type: int) -> None:
    """Write a GGUF file in another type with llama.cpp's own quantization.

    Args:
        source: a GGUF file in a floating-point type.
        path: of the new file.
        file_type: in `gguf.LlamaFileType`.

    Raises:
        ImportError: llama-cpp-python is not installed.
        RuntimeError: llama.cpp does not write the file.
    """
    functions = library("Quantization by llama.cpp")
    parameters = functions.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, torch.get_num_threads()
    with _log(functions) as lines:
        status = functions.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama.cpp does not write {path.name}: {' '.join(lines)[-500:]}")


def tokenize(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts by the vocabulary in a GGUF file; special tokens are recognized, none is added."""
    functions = library("Reading a GGUF file")
    found = []
    with _model(functions, path) as (model, _):
        vocabulary = functions.llama_model_get_vocab(model)
        for text in texts:
            encoded = text.encode()
            ids = (functions.llama_token * (len(encoded) + 8))()
            number = functions.llama_tokenize(vocabulary, encoded, len(encoded), ids, len(ids), False, True)
            found.append(list(ids[:number]))
    return found
