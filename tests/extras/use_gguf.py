# SPDX-License-Identifier: Apache-2.0
"""The extra gguf: the tiny model is exported without llama.cpp, which the extra llamacpp brings."""

from pathlib import Path

from using import fastvlm

fastvlm("export", "gguf", "tiny", "exported", "--precision", "q8_0,q4_0")
assert {path.name for path in Path("exported").glob("*.gguf")} == {
    "language_model-q8_0.gguf",
    "language_model-q4_0.gguf",
}
assert Path("exported", "vision_encoder.onnx").is_file()
