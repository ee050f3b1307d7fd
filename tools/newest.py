#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run tests on the newest release of Transformers and of everything else but PyTorch, and say loudly what fails.

    python tools/newest.py .venvs/newest tests/test_generation.py ...

The environment is made anew each time. Where it holds exactly the versions of the lock, no test is run: `make test`
runs them all on these. The exit status is 0, whatever fails: a release that setup.cfg does not allow
is news, and no fault of a change. CONTRIBUTING.md says how a release is taken in.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import environment

WIDTH = 100
OWN = {"transformers-fastvlm", "pip", "setuptools"}
"""Of every environment, and in no lock."""


def installed(folder: Path) -> dict[str, str]:
    """Return the version of each package in the environment in `folder`, by its normalized name."""
    code = "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions()), sep=chr(10))"
    done = subprocess.run([environment.python_of(folder), "-c", code], capture_output=True, text=True, check=True)
    pairs = (line.split() for line in done.stdout.splitlines())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def report(title: str, lines: list[str]) -> None:
    """Print a block that nobody overlooks in a log."""
    print("\n" + "#" * WIDTH)
    for line in (f"NEWEST RELEASES: {title}", *lines):
        print(f"# {line}")
    print("#" * WIDTH, flush=True)


def main() -> None:
    """Make the environment, run the tests and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the environment")
    arguments, tests = parser.parse_known_args()
    folder = arguments.folder.absolute()
    try:
        environment.newest(folder)
    except SystemExit as stop:
        report("no environment", [str(stop)])
        return
    versions, locked = installed(folder), environment.locked("dev")
    differ = [
        f"{name} {version} (locked: {' or '.join(locked.get(name, ['not at all']))})"
        for name, version in sorted(versions.items())
        if version not in locked.get(name, []) and name not in OWN
    ]
    if not differ:
        about = "the lock has today's newest release of every package; `make test` runs the suite on them"
        report(f"Transformers {versions['transformers']}: nothing newer", [about])
        return
    command = [environment.python_of(folder), "-m", "pytest", *tests]
    lines: list[str] = []
    with subprocess.Popen(command, cwd=environment.REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line.rstrip())
    title = f"Transformers {versions['transformers']}: " + (
        "all passed" if process.returncode == 0 else f"FAILED, pytest's exit status is {process.returncode}"
    )
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    report(title, [*lines[-1:], *failed, "Not as locked: " + ", ".join(differ)])


if __name__ == "__main__":
    main()
