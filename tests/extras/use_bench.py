# SPDX-License-Identifier: Apache-2.0
"""The extra bench: measurements are drawn; timm has the encoders to compare with."""

from pathlib import Path

import timm
from using import fastvlm

assert timm.is_model("vit_large_patch14_clip_336")
fastvlm("bench", "tiny", "--repetitions", "1", "--warmup", "0", "--new-tokens", "4", "--plots", "plots")
assert any(Path("plots").iterdir())
