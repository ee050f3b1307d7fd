#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Install each extra of setup.cfg alone, as a user does, in the newest versions that setup.cfg allows, and use it.

    python tools/check_extras.py .venvs/extras               every extra but those of BUILT, one after the other
    python tools/check_extras.py .venvs/extras eval onnx     these

The environment is made anew for each. tests/extras/use_NAME.py is the use: it runs in an empty folder, without a
network. Ends with `N passed, N failed`; exits 1 if one failed.
"""

import argparse
import configparser
import os
import subprocess
import tempfile
import time
from pathlib import Path

import environment

USES = environment.REPOSITORY / "tests" / "extras"
LIMIT = 600  # seconds for one
BUILT = ("llamacpp",)  # pip would build its package again for ten minutes; `make test-llamacpp` installs and uses it


def extras() -> list[str]:
    """Return the names of the extras in setup.cfg that are checked unless others are named."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(environment.REPOSITORY / "setup.cfg", encoding="utf-8")
    return [name for name in parser["options.extras_require"] if name not in BUILT]


def use(extra: str, folder: Path) -> bool:
    """Install an extra into a new environment in `folder`, run its program, and return whether both went well."""
    environment.new_environment(folder)
    if environment.pip(folder, "install", "--editable", f".[{extra}]").returncode:
        return False
    program = [environment.python_of(folder), str(USES / f"use_{extra.replace('-', '_')}.py")]
    with tempfile.TemporaryDirectory() as work:
        variables = os.environ | {"HF_HOME": work, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            return subprocess.run(program, cwd=work, env=variables, check=False, timeout=LIMIT).returncode == 0
        except subprocess.TimeoutExpired:
            print(f"{program[1]} took more than {LIMIT} seconds", flush=True)
            return False


def main() -> int:
    """Check the extras and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the environment")
    parser.add_argument("extras", nargs="*", help="default: all but those of BUILT")
    arguments = parser.parse_args()
    failed = []
    names = arguments.extras or extras()
    for name in names:
        start = time.monotonic()
        print(f"--- extra {name}", flush=True)
        if not use(name, arguments.folder.absolute()):
            failed.append(name)
        print(f"{'FAILED' if name in failed else 'ok'}: extra {name}, {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
