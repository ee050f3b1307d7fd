# SPDX-License-Identifier: Apache-2.0
"""The layout of weights in memory that llama.cpp uses on a CPU.

The library rewrites quantized weights while it loads them. On a CPU with AMX it takes a layout whose first matrix
multiplication crashes the process if the library was built by a GCC before 11.5, 12.4, 13.3 or 14.1: these compilers
drop most of the tile configuration that the instruction `ldtilecfg` reads (PR target/114098 of GCC). The compiler of an
installed library is not known, so on such CPUs the weights get the layout for AVX2 and AVX-512 instead.
"""

import ctypes
import os
import re
from typing import Any

from .gguf_header import GgufTensor, read_gguf_header

__all__ = ["choose_layout"]

_AMX = b"AMX_INT8 = 1"
_REPACKED = b"CPU_REPACK"
_REPACKED_TYPES = {2, 12}  # Q4_0 and Q4_K
_REPACKED_ROWS = 8  # rows that are interleaved


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override`: the buffer type of tensors whose names match a pattern."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def choose_layout(library: Any, options: Any, path: str | os.PathLike[str]) -> Any:
    """Set the fields of `llama_model_params` that choose the layout.

    Args:
        library: llama-cpp-python's C interface.
        options: the parameters, for a model that stays on the CPU.
        path: the GGUF file.

    Returns:
        An object that must stay referenced until the model is loaded; None if there is none.

    Raises:
        OSError: the file cannot be read.
    """
    options.use_extra_bufts = _AMX not in library.llama_print_system_info()
    if options.use_extra_bufts:
        return None
    try:
        tensors = read_gguf_header(path).tensors
    except OSError:  # the library says the same while it loads the file
        return None
    names = [name for name, tensor in tensors.items() if _is_repacked(name, tensor)]
    buffer_type = _buffer_type(library)
    if not names or buffer_type is None:
        return None
    pattern = "^(" + "|".join(map(re.escape, names)) + ")$"
    overrides = (_Override * 2)(_Override(pattern.encode(), buffer_type), _Override(None, None))
    options.tensor_buft_overrides = ctypes.addressof(overrides)
    return overrides


def _is_repacked(name: str, tensor: GgufTensor) -> bool:
    """Whether the library has such a layout for a tensor. Embeddings are looked up row by row, so they have none."""
    matrix = name.startswith("blk.") and name.endswith(".weight") and len(tensor.shape) == 2
    return matrix and tensor.kind in _REPACKED_TYPES and tensor.shape[1] % _REPACKED_ROWS == 0


def _buffer_type(library: Any) -> Any:
    """Return the type of buffers with the layout for AVX2 and AVX-512, or None if the library does not offer it."""
    pointer, text = ctypes.c_void_p, ctypes.c_char_p

    def function(name: str, arguments: list[Any], result: Any) -> Any:
        return library.ctypes_function(name, arguments, result)(lambda: None)

    try:
        registry = function("ggml_backend_reg_by_name", [text], pointer)(b"CPU")
        device = function("ggml_backend_dev_by_name", [text], pointer)(b"CPU")
        find = function("ggml_backend_reg_get_proc_address", [pointer, text], pointer)
        buffer_name = function("ggml_backend_buft_name", [pointer], text)
    except AttributeError:  # on Windows, whose linker does not look into the libraries that a library needs
        return None
    listed = find(registry, b"ggml_backend_dev_get_extra_bufts")
    if not listed:
        return None
    found = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(listed)(device)
    index = 0
    while found[index]:
        if buffer_name(found[index]) == _REPACKED:
            return found[index]
        index += 1
    return None
