# SPDX-License-Identifier: Apache-2.0
"""The extra schema: an answer is one of the choices, and JSON of the form that a file says."""

import json
from pathlib import Path

from using import IMAGE, fastvlm

ask = ("generate", str(IMAGE), "-m", "tiny", "-p", "What number is written?")
assert fastvlm(*ask, "--choices", "one,two,three").strip() in ("one", "two", "three")
schema = {"type": "object", "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 999}}}
Path("schema.json").write_text(json.dumps({**schema, "required": ["number"], "additionalProperties": False}))
assert 0 <= json.loads(fastvlm(*ask, "--schema", "schema.json"))["number"] <= 999
