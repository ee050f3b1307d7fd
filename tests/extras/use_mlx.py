# SPDX-License-Identifier: Apache-2.0
"""The extra mlx: the tiny model is exported, and MLX and mlx-vlm can be imported."""

from pathlib import Path

import mlx.core  # noqa: F401
import mlx_vlm  # noqa: F401
from using import fastvlm

fastvlm("export", "mlx", "tiny", "exported")
assert any(Path("exported").iterdir())
