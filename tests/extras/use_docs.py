# SPDX-License-Identifier: Apache-2.0
"""The extra docs: the site is built."""

import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(root / "mkdocs.yml")]
subprocess.run([*command, "--site-dir", str(Path("site").absolute())], check=True)
assert (Path("site") / "index.html").is_file()
