# SPDX-License-Identifier: Apache-2.0
"""The extra training: two steps on the tiny model, whose result answers; TRL, peft and tensorboard can be imported."""

import json
from pathlib import Path

import peft  # noqa: F401
import tensorboard  # noqa: F401
from trl import SFTTrainer  # noqa: F401
from using import ANSWER, IMAGE, QUESTION, fastvlm

turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
Path("train.json").write_text(json.dumps([{"image": str(IMAGE), "conversations": turns}] * 4))
fastvlm(
    *("train", "finetune", "model.path=tiny", "data.source=train.json", f"data.image_folder={IMAGE.parent}"),
    *("output_dir=out", "train.global_batch_size=2", "arguments.per_device_train_batch_size=2"),
    "arguments.max_steps=2",
)
assert fastvlm("generate", str(IMAGE), "-p", QUESTION, "-m", "out").strip()
