# SPDX-License-Identifier: Apache-2.0
"""The extra eval: lmms-eval judges answers to one's own questions; the report is written, and its plot can be."""

import json
import shutil
from pathlib import Path

import matplotlib  # noqa: F401
from using import ANSWER, IMAGE, QUESTION, fastvlm

shutil.copy(IMAGE, "sign.png")
Path("own.jsonl").write_text(json.dumps({"image": "sign.png", "question": QUESTION, "answer": ANSWER}) + "\n")
fastvlm("eval", "tiny", "--data", "own.jsonl", "--metric", "substring", "--out", "results")
fastvlm("eval-report", "results", "--out", "report")
assert (Path("report") / "report.json").is_file()
