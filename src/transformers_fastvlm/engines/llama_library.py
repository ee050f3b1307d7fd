# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's C interface, by the package llama-cpp-python: a model, and a context of many sequences.

A failed assertion in the library aborts the process, so each argument is checked before the call.
"""

import ctypes
import functools
import os
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import needs
from .llama_layouts import choose_layout

__all__ = ["INSTALL", "MAX_SEQUENCES", "LlamaContext", "LlamaError", "LlamaModel", "library", "quantize_file"]

INSTALL = 'pip install "transformers-fastvlm[llamacpp]"'

MAX_SEQUENCES = 256
"""Maximum sequences of a context, in the library."""

_LEVEL_OF_ERRORS = 4
_CACHE_FULL = 1
_ALL_LAYERS = -1
_AVX512 = b"AVX512 = 1"
_MAX_SCORES = 1 << 30  # bytes

_Array = np.ndarray[Any, Any]


class LlamaError(RuntimeError):
    """A call of llama.cpp failed; the message has what the library logged about it."""


class LlamaModel:
    """The weights of a GGUF file.

    Args:
        path: the file, already checked by `read_gguf_header` and `check_gguf`.
        offload: compute all layers on the GPU.

    Attributes:
        vocabulary: number of the logits.
        hidden_size: width of an embedding.

    Raises:
        ImportError: llama-cpp-python is not installed.
        LlamaError: the library cannot load the file.
        ValueError: `offload`, but the library was built without a GPU.
    """

    def __init__(self, path: str | os.PathLike[str], *, offload: bool = False) -> None:
        self.library = library()
        if offload and not self.library.llama_supports_gpu_offload():
            raise ValueError("the installed llama-cpp-python was built for the CPU only.")
        options = self.library.llama_model_default_params()
        options.n_gpu_layers = _ALL_LAYERS if offload else 0
        layout = None if offload else choose_layout(self.library, options, path)
        self.offload = offload
        self._pointer = _called(
            f"load {Path(path)}", lambda: self.library.llama_model_load_from_file(os.fsencode(path), options)
        )
        del layout  # the library has read it
        self._free = _freed(self, self.library.llama_model_free, self._pointer)
        self.hidden_size = int(self.library.llama_model_n_embd(self._pointer))
        self.vocabulary = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self._pointer)))

    @staticmethod
    def can_offload() -> bool:
        """Whether the library was built for a GPU.

        Raises:
            ImportError: llama-cpp-python is not installed.
        """
        return bool(library().llama_supports_gpu_offload())

    @property
    def pointer(self) -> Any:
        """The library's pointer.

        Raises:
            ValueError: the model is closed.
        """
        if not self._free.alive:
            raise ValueError("the model is closed.")
        return self._pointer

    def close(self) -> None:
        """Free the memory; its contexts must be closed before."""
        self._free()


class LlamaContext:
    """Keys and values of many sequences, in one cache that they share. Not thread-safe.

    Args:
        model: the weights.
        tokens: capacity of the cache in tokens, for all sequences together.
        sequences: number of sequences, at most `MAX_SEQUENCES`.
        rows: maximum number of rows of a call of `decode`; a small cache lowers it.
        threads: number of threads.
        exact: keep keys and values in float32 and compute attention plainly, which is a little slower.

    Attributes:
        rows: maximum number of rows of a call.

    Raises:
        LlamaError: there is not enough memory.
    """

    def __init__(
        self, model: LlamaModel, *, tokens: int, sequences: int, rows: int, threads: int, exact: bool = False
    ) -> None:
        for name, value, most in (("tokens", tokens, 2**31 - 1), ("sequences", sequences, MAX_SEQUENCES)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; expected 1 to {most}.")
        self.model, self.tokens, self.sequences, self.rows = model, tokens, sequences, rows
        self._library = model.library
        options = self._options(threads, exact)
        self._pointer = _called(
            f"open a cache of {tokens:,} tokens", lambda: self._library.llama_init_from_model(model.pointer, options)
        )
        self._free = _freed(self, self._library.llama_free, self._pointer, model)
        self.rows = int(self._library.llama_n_batch(self._pointer))  # the library lowers it for a small cache
        self._outputs: dict[int, int] = {}

    def _options(self, threads: int, exact: bool) -> Any:
        library, options = self._library, self._library.llama_context_default_params()
        options.n_ctx, options.n_seq_max = self.tokens, self.sequences
        options.n_batch = options.n_ubatch = self.rows
        options.n_outputs_max = min(self.sequences, self.rows)  # else it would allocate logits for all rows
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True  # else each sequence has a fixed part of the cache, and shares no beginning
        options.offload_kqv = options.op_offload = self.model.offload
        if exact:
            options.type_k = options.type_v = library.GGML_TYPE_F32
        if exact or self._decodes_faster_plainly():
            options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return options

    def _decodes_faster_plainly(self) -> bool:
        """Whether flash attention slows decoding down: in builds for AVX-512 it does, for a few rows at a time.

        It is faster for long prompts, and does not need memory for the scores of all rows.
        """
        heads = int(self._library.llama_model_n_head(self.model.pointer))
        scores = np.dtype(np.float32).itemsize * heads * self.rows * self.tokens
        built_for_it = _AVX512 in self._library.llama_print_system_info()
        return built_for_it and not self.model.offload and scores <= _MAX_SCORES

    def decode(
        self,
        sequences: _Array,
        positions: _Array,
        outputs: _Array,
        *,
        ids: _Array | None = None,
        embeddings: _Array | None = None,
    ) -> bool:
        """Compute rows, which are either token ids or embeddings.

        Args:
            sequences: (rows,) the sequence of each row.
            positions: (rows,) its position; each sequence's go on where those before end.
            outputs: (rows,) bool, whether `logits` has logits of the row.
            ids: (rows,) token ids.
            embeddings: (rows, hidden_size) float32.

        Returns:
            Whether the rows fit into the cache; if not, nothing was computed.

        Raises:
            LlamaError: the library failed.
            ValueError: an argument is out of range.
        """
        count = self._checked(sequences, positions, outputs, ids, embeddings)
        library, batch, kept = self._library, self._library.llama_batch(), []

        def pointer(array: _Array, dtype: Any, kind: Any) -> Any:
            kept.append(np.ascontiguousarray(array, dtype))  # it must live until the call ends
            return ctypes.cast(kept[-1].ctypes.data, ctypes.POINTER(kind))

        batch.n_tokens = count
        if ids is not None:
            batch.token = pointer(ids, np.int32, ctypes.c_int32)
        else:
            batch.embd = pointer(np.asarray(embeddings), np.float32, ctypes.c_float)
        batch.pos = pointer(positions, np.int32, ctypes.c_int32)
        batch.n_seq_id = pointer(np.ones(count), np.int32, ctypes.c_int32)
        first = ctypes.addressof(pointer(sequences, np.int32, ctypes.c_int32).contents)
        addresses = first + np.arange(count) * np.dtype(np.int32).itemsize
        batch.seq_id = pointer(addresses, np.uintp, ctypes.POINTER(ctypes.c_int32))
        batch.logits = pointer(outputs, np.int8, ctypes.c_int8)
        self._outputs = {}
        _errors.clear()
        failure = library.llama_decode(self._open(), batch)
        if failure == _CACHE_FULL:
            return False
        if failure:
            raise LlamaError(f"llama.cpp cannot compute {count} rows (code {failure}): {_said()}")
        self._outputs = {int(row): index for index, row in enumerate(np.flatnonzero(outputs))}
        return True

    def logits(self, row: int) -> _Array:
        """Return a view of the logits (vocabulary,) of a row of the last `decode`, valid until the next.

        Raises:
            ValueError: the row was not among the outputs.
        """
        if row not in self._outputs:
            raise ValueError(f"row {row} has no logits; expected one of {', '.join(map(str, self._outputs))}.")
        pointer = self._library.llama_get_logits_ith(self._open(), row)
        return np.ctypeslib.as_array(pointer, (self.model.vocabulary,))

    def copy(self, source: int, target: int, end: int) -> None:
        """Let an empty sequence share the positions before `end` of another."""
        self._check_sequences(np.array([source, target]))
        self._library.llama_memory_seq_cp(self._memory(), source, target, 0, end)

    def remove(self, sequence: int) -> None:
        """Empty a sequence."""
        self._check_sequences(np.array([sequence]))
        self._library.llama_memory_seq_rm(self._memory(), sequence, -1, -1)

    def clear(self) -> None:
        """Empty all sequences, and overwrite the cache: NaN in unused places would spread."""
        self._library.llama_memory_clear(self._memory(), True)

    def close(self) -> None:
        """Free the memory."""
        self._free()

    def _open(self) -> Any:
        if not self._free.alive:
            raise ValueError("the context is closed.")
        return self._pointer

    def _memory(self) -> Any:
        return self._library.llama_get_memory(self._open())

    def _check_sequences(self, sequences: _Array) -> None:
        if ((sequences < 0) | (sequences >= self.sequences)).any():
            raise ValueError(
                f"the sequences go from {sequences.min()} to {sequences.max()}; expected 0 to {self.sequences - 1}."
            )

    def _checked(
        self, sequences: _Array, positions: _Array, outputs: _Array, ids: _Array | None, embeddings: _Array | None
    ) -> int:
        """Check the arguments of `decode`; return the number of rows."""
        count = len(sequences)
        if not 1 <= count <= self.rows:
            raise ValueError(f"there are {count} rows; expected 1 to {self.rows}.")
        if (ids is None) == (embeddings is None):
            raise ValueError("expected either ids or embeddings.")
        shapes: dict[str, tuple[_Array | None, tuple[int, ...]]] = {
            "positions": (positions, (count,)),
            "outputs": (outputs, (count,)),
            "ids": (ids, (count,)),
            "embeddings": (embeddings, (count, self.model.hidden_size)),
        }
        for name, (array, shape) in shapes.items():
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} has the shape {array.shape}; expected {shape}.")
        self._check_sequences(sequences)
        if ((positions < 0) | (positions >= self.tokens)).any():
            raise ValueError(
                f"the positions go from {positions.min()} to {positions.max()}; expected 0 to {self.tokens - 1}."
            )
        if ids is not None and ((ids < 0) | (ids >= self.model.vocabulary)).any():
            raise ValueError(
                f"the token ids go from {ids.min()} to {ids.max()}; expected 0 to {self.model.vocabulary - 1}."
            )
        if np.count_nonzero(outputs) > min(self.sequences, self.rows):
            raise ValueError(
                f"logits are requested for {np.count_nonzero(outputs)} rows; expected one row per sequence."
            )
        return count


# The library, once a process

_errors: deque[str] = deque(maxlen=8)
_loading = threading.Lock()


def library(why: str = "The engine llamacpp") -> Any:
    """Return llama-cpp-python's C interface, ready for use; what the library logs is kept and not printed.

    Args:
        why: what needs it, as the subject of a sentence.

    Raises:
        ImportError: llama-cpp-python is not installed, or its library cannot be loaded.
    """
    with _loading:
        with needs("llama-cpp-python", why, INSTALL, module="llama_cpp"):
            import llama_cpp.llama_cpp as loaded
        return _ready(loaded)


@functools.cache
def _ready(loaded: Any) -> Any:
    # After a failed assertion it would start a debugger for a backtrace. Python's own copy of the environment, which
    # subprocesses inherit, stays as it is.
    os.putenv("GGML_NO_BACKTRACE", "1")
    loaded.llama_log_set(_listener(loaded), ctypes.c_void_p(0))
    loaded.llama_backend_init()
    return loaded


def quantize_file(source: Path, path: Path, file_type: int, threads: int) -> None:
    """Write a GGUF file in another type with llama.cpp's own quantization.

    Args:
        source: a GGUF file in a floating-point type.
        path: of the new file.
        file_type: in `gguf.LlamaFileType`.
        threads: number of threads.

    Raises:
        ImportError: llama-cpp-python is not installed.
        LlamaError: llama.cpp does not write the file.
    """
    functions = library("Quantization by llama.cpp")
    options = functions.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, threads
    _errors.clear()
    if functions.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(options)):
        raise LlamaError(f"llama.cpp cannot write {path}: {_said()}")


@functools.cache
def _listener(loaded: Any) -> Any:
    """Return the library's listener; the cache keeps it referenced."""

    def listen(level: int, text: bytes, _: Any) -> None:
        if level == _LEVEL_OF_ERRORS:
            _errors.append(text.decode("utf-8", "replace").strip())

    return loaded.llama_log_callback(listen)


def _said() -> str:
    return "; ".join(_errors) or "the library gives no reason"


def _called(what: str, call: Any) -> Any:
    """Return a new pointer of the library, or raise `LlamaError`."""
    _errors.clear()
    pointer = call()
    if not pointer:
        raise LlamaError(f"llama.cpp cannot {what}: {_said()}")
    return pointer


def _freed(owner: Any, free: Any, pointer: Any, *needed: Any) -> "weakref.finalize[Any, Any]":
    """Free a pointer when its owner is closed or gone, but not when the process ends: a thread may still use it.

    Args:
        owner, pointer: as above.
        free: the library's function.
        *needed: objects that are kept until then.
    """
    finalizer = weakref.finalize(owner, lambda kept: free(pointer), needed)
    finalizer.atexit = False
    return finalizer
