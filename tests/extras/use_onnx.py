# SPDX-License-Identifier: Apache-2.0
"""The extra onnx: the tiny model is exported and answers in onnxruntime."""

from PIL import Image
from using import ANSWER, IMAGE, QUESTION, fastvlm

from transformers_fastvlm.engines import Sampling, load_engine

fastvlm("export", "onnx", "tiny", "exported", "--precision", "float32")
engine = load_engine("onnx", "exported")
image = Image.open(IMAGE).convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
(answer,) = engine.generate([[{"role": "user", "content": content}]], Sampling(max_new_tokens=16))
assert ANSWER in answer.text, answer
