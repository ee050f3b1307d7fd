# SPDX-License-Identifier: Apache-2.0
"""The extra llamacpp: llama.cpp and onnxruntime are there. What the engine reads is written with the extra gguf."""

import contextlib

import onnxruntime

from transformers_fastvlm.engines import load_engine
from transformers_fastvlm.engines.llama_library import LlamaModel

assert LlamaModel.can_offload() in (True, False)
assert "CPUExecutionProvider" in onnxruntime.get_available_providers()
with contextlib.suppress(FileNotFoundError):
    load_engine("llamacpp", "exported")
    raise AssertionError("there is no such directory")
