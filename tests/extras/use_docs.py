# SPDX-License-Identifier: Apache-2.0
"""The extra docs: the site is built."""

import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
# Zensical writes into the project's folder alone.
for name in ("docs", "src", "tools", "mkdocs.yml"):
    copy = shutil.copy if (root / name).is_file() else shutil.copytree
    copy(root / name, name)
subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], check=True)
assert Path("site/index.html").is_file()
