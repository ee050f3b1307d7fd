# SPDX-License-Identifier: Apache-2.0
"""The layout of weights in memory that llama.cpp uses on a CPU.

The library rewrites quantized weights while it loads them. On a CPU with AMX it takes a layout whose first matrix
multiplication crashes the process if the library was built by a GCC before 11.5, 12.4, 13.3 or 14.1: these compilers
drop most of the tile configuration that the instruction `ldtilecfg` reads (PR target/114098 of GCC), unless they are
told to keep all stores. So the layout for AMX is used only if the library's file says that a compiler or its options
are good, and the layout for AVX2 and AVX-512 otherwise.

The library configures the tiles once per thread. A thread that decodes must not run other code for AMX, such as
PyTorch's in bfloat16, which releases them.
"""

import ctypes
import math
import os
import re
from pathlib import Path
from typing import Any

from .gguf_header import GgufTensor, read_gguf_header
from .openmp import loaded_files

__all__ = ["choose_layout", "configures_tiles", "library_files"]

_AMX = b"AMX_INT8 = 1"
_KEEP_STORES = (b"-fno-tree-dse", b"-fno-dse")  # in the file if it was built with -frecord-gcc-switches
_FIRST_GOOD_MINOR = {11: 5, 12: 4, 13: 3, 14: 1}  # of GCC, by its major version
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
    """
    amx = _AMX in library.llama_print_system_info()
    options.use_extra_bufts = not amx or configures_tiles(library_files())
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


def library_files() -> list[Path]:
    """Return the loaded file with llama.cpp's kernels for CPUs, on Linux; elsewhere nothing."""
    return loaded_files("ggml-cpu")


def configures_tiles(files: list[Path]) -> bool:
    """Whether files of the library were certainly compiled with a whole configuration of AMX's tiles."""
    try:
        return bool(files) and all(_compiled_well(path.read_bytes()) for path in files)
    except OSError:
        return False


def _compiled_well(code: bytes) -> bool:
    if all(option in code for option in _KEEP_STORES) or b"clang version" in code:
        return True
    versions = re.findall(rb"GCC: \([^)\0]*\) (\d+)\.(\d+)", code)
    return bool(versions) and all(
        int(major) > max(_FIRST_GOOD_MINOR) or int(minor) >= _FIRST_GOOD_MINOR.get(int(major), math.inf)
        for major, minor in versions
    )


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
