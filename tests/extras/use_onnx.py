# SPDX-License-Identifier: Apache-2.0
"""The extra onnx: the tiny model is exported and answers in onnxruntime."""

import json
from pathlib import Path

from PIL import Image
from using import ANSWER, IMAGE, QUESTION, fastvlm

from transformers_fastvlm.engines import Sampling, load_engine

fastvlm("export", "onnx", "tiny", "exported", "--precision", "float32")
engine = load_engine("onnx", "exported")
content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
conversation = ([{"role": "user", "content": content}], [Image.open(IMAGE).convert("RGB")])
(answer,) = engine.generate([conversation], Sampling(max_new_tokens=16))
assert ANSWER in answer.text, (json.dumps(answer.text), list(Path("exported").iterdir()))
