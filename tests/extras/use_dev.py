# SPDX-License-Identifier: Apache-2.0
"""The extra dev: the tools of `make check` start."""

import subprocess
import sys

for tool in ("build", "mypy", "ruff"):
    subprocess.run([sys.executable, "-m", tool, "--version"], check=True)
