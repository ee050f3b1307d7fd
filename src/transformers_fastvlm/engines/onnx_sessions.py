# SPDX-License-Identifier: Apache-2.0
"""Sessions of onnxruntime: the one place that opens a graph, on a device that the installed package supports."""

import os
from typing import Any

import numpy as np
import torch

from .._optional import needs

__all__ = ["open_session", "run_and_keep", "session_device"]

_PROVIDER_OF = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
_MEMORY_OF = {"CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
"""Names of the memory of providers that compute outside the CPU's memory."""

_PACKAGE_WITH = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu in place of onnxruntime",
    "directml": "onnxruntime-directml in place of onnxruntime, on Windows",
    "coreml": "onnxruntime on macOS",
}
_EXTRA = 'pip install "transformers-fastvlm[onnx]"'
_ERRORS_ONLY = 3


def session_device(name: str = "auto", option: str = "device") -> str:
    """Return the device that a name stands for, after a check that the installed onnxruntime has its provider.

    Args:
        name: "cpu", "cuda", "directml" or "coreml"; "cuda:1" and "directml:1" name a further GPU. "auto" is CUDA if
            PyTorch sees a GPU too, else DirectML, else the CPU; never Core ML, which has few of these operations.
        option: name of the option in error messages.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: unknown device, or the installed onnxruntime lacks its provider.
    """
    available = _runtime().get_available_providers()
    if name == "auto":
        sees = {"cuda": torch.cuda.is_available(), "directml": True}
        return next((kind for kind, seen in sees.items() if seen and _PROVIDER_OF[kind] in available), "cpu")
    kind, colon, number = name.partition(":")
    if kind not in _PROVIDER_OF or (colon and not (kind in ("cuda", "directml") and number.isdecimal())):
        raise ValueError(f"{option} is {name!r}; expected auto, cpu, cuda (or cuda:1 and so on), directml or coreml.")
    if _PROVIDER_OF[kind] not in available:
        raise ValueError(
            f"{option} is {name!r}, but the installed onnxruntime has no {_PROVIDER_OF[kind]}; it has "
            f"{', '.join(available)}. Install {_PACKAGE_WITH[kind]}, or choose another device."
        )
    return name


def open_session(
    path: str | os.PathLike[str], *, device: str = "cpu", threads: int | None = None, prepack: bool = True
) -> Any:
    """Open a graph as an `onnxruntime.InferenceSession`.

    Operations that the device's provider lacks run on the CPU; a provider that does not start is an error.

    Args:
        path: the ONNX file.
        device: see `session_device`.
        threads: threads on the CPU; by default as many as PyTorch uses.
        prepack: copy the weights into the fastest memory layout; False needs half the memory.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: unknown device, or one that onnxruntime cannot use here.
    """
    runtime, device = _runtime(), session_device(device)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = _ERRORS_ONLY
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    kind, _, number = device.partition(":")
    if kind == "directml":
        options.enable_mem_pattern = False  # DirectML's provider does not take sessions with it
    provider, settings = _PROVIDER_OF[kind], {"device_id": number} if number else {}
    # The fallback would print, and open the session on the CPU.
    session = runtime.InferenceSession(
        os.fspath(path), options, providers=[(provider, settings)], enable_fallback=False
    )
    if provider not in session.get_providers():  # onnxruntime only logs that it left the provider out
        raise ValueError(
            f"device is {device!r}, but {provider} does not start here: its libraries or the device are missing. "
            "See onnxruntime's page of this provider for the versions that it needs, or choose device 'cpu'."
        )
    return session


def run_and_keep(session: Any, feeds: dict[str, Any]) -> list[Any]:
    """Run a graph and return its outputs: the first as an array, on a GPU the others as values that stay there.

    On the CPU all are arrays: onnxruntime copies neither these nor the inputs, so binding them would only cost time.

    Args:
        session: from `open_session`.
        feeds: arrays, or outputs of an earlier call, by the names of the inputs.
    """
    provider = session.get_providers()[0]
    if provider not in _MEMORY_OF:
        outputs: list[Any] = session.run(None, feeds)
        return outputs
    number = int(session.get_provider_options()[provider].get("device_id", 0))
    return _run_bound(session, feeds, _MEMORY_OF[provider], number)


def _run_bound(session: Any, feeds: dict[str, Any], memory: str, number: int) -> list[Any]:
    binding = session.io_binding()
    for name, value in feeds.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, np.asarray(value, order="C"))
        else:
            binding.bind_ortvalue_input(name, value)
    first, *others = (output.name for output in session.get_outputs())
    binding.bind_output(first)
    for name in others:
        binding.bind_output(name, memory, number)
    session.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    return [outputs[0].numpy(), *outputs[1:]]


def _runtime() -> Any:
    with needs("onnxruntime", "The engine onnx", _EXTRA):
        import onnxruntime
    return onnxruntime
