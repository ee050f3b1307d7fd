# SPDX-License-Identifier: Apache-2.0
"""The extra apple-app: the tiny model is exported, which runs on Linux too."""

from pathlib import Path

from using import fastvlm

fastvlm("export", "apple-app", "tiny", "exported")
assert any(Path("exported").iterdir())
