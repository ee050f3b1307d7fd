#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the Makefile's environments with uv from the locks in requirements/, and make the locks.

    python tools/environment.py make .venvs/eval eval             what requirements/eval.txt names, nothing else
    python tools/environment.py make .venv package --keep         and leave what else is there
    python tools/environment.py make .venvs/minimal minimal --package dist/*.whl
    python tools/environment.py newest .venvs/newest              no lock and no cap on Transformers; PyTorch as locked
    python tools/environment.py lock                              resolve requirements/*.in again, newest versions
    python tools/environment.py lock dev --keep                   only what changed in dev.in or setup.cfg moves

A lock can name a version that has no wheel for this platform or Python. Then the newest versions within setup.cfg's
bounds are installed, and a line says so. The script needs nothing beside Python. pip brings uv into `.venvs/uv`.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = REPOSITORY / "requirements"
UV = REPOSITORY / ".venvs" / "uv"
NAME = "transformers-fastvlm"

# Every lock but the first two starts from the versions of another and differs only where it must, so that a failure in
# an environment is about what the environment is for.
STARTS_FROM = {
    "build": None,
    "dev": None,
    "package": "dev",
    "minimal": "dev",
    "serving": "dev",
    "export": "dev",
    "llamacpp": "dev",
    "eval": "dev",
    "transformers-5.16.1": "dev",
    "transformers-5.19": "dev",
    "transformers-5.23": "dev",
    "vllm": None,
    "eval-vllm": "vllm",
}
# vLLM's CPU build wants a build of PyTorch that PyPI does not have, and is itself for Linux alone.
VLLM_OPTIONS = ["--overrides", "requirements/vllm-overrides.txt", "--excludes", "requirements/vllm-excludes.txt"]
VLLM_PLATFORM = ["--python-platform", "x86_64-unknown-linux-gnu"]

# Without these options older GCCs compile llama.cpp's matrix multiplication for AMX wrongly (docs/gguf.md). Other
# compilers do not know them.
LLAMACPP_OPTIONS = "-fno-tree-dse -fno-dse -frecord-gcc-switches"
LLAMACPP_SETTINGS = ["--config-settings-package", f"llama-cpp-python:cmake.define.CMAKE_CXX_FLAGS={LLAMACPP_OPTIONS}"]
HAS_GCC = sys.platform == "linux" and platform.machine() == "x86_64" and "CXX" not in os.environ


def python_of(folder: Path) -> str:
    """Return the path of the interpreter of the environment in `folder`."""
    return str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))


def uv(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run uv, which is installed first where it is not of the version in requirements/uv.txt.

    Args:
        arguments: of uv.
        capture: keep what it writes; it is shown otherwise.

    Raises:
        SystemExit: if pip cannot install uv.
    """
    pin = (LOCKS / "uv.txt").read_text(encoding="utf-8")
    stamp = UV / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != pin:
        shutil.rmtree(UV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(UV)], check=True)
        install = [python_of(UV), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*install, "-r", str(LOCKS / "uv.txt")], check=False).returncode:
            raise SystemExit(
                f"pip could not install {pin.strip()}, which makes the environments; see its message above."
            )
        stamp.write_text(pin, encoding="utf-8")
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    command = [python_of(UV), "-m", "uv", *quiet, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=capture, text=True, check=False)


def new_environment(folder: Path) -> None:
    """Make an empty environment of this Python in `folder`.

    Raises:
        SystemExit: if uv cannot.
    """
    if uv("venv", "--clear", "--python", sys.executable, str(folder)).returncode:
        raise SystemExit(f"No environment could be made in {folder}; uv's reason is above.")


def pip(folder: Path, command: str, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `uv pip` with `command`, such as "install", for the environment in `folder`."""
    return uv("pip", command, "--python", python_of(folder), *arguments, capture=capture)


def make(folder: Path, name: str, package: Sequence[str] = ("--editable", "."), keep: bool = False) -> None:
    """Bring the environment in `folder` to what a lock says, and install the package into it.

    Args:
        folder: the environment, which is made if it is not there.
        name: of the lock, such as "dev".
        package: what is installed beside it, without dependencies; empty for nothing.
        keep: leave packages there that the lock does not name.

    Raises:
        SystemExit: if neither the locked nor the newest versions can be installed.
    """
    if not Path(python_of(folder)).exists():
        new_environment(folder)
    lock = LOCKS / f"{name}.txt"
    settings = LLAMACPP_SETTINGS if HAS_GCC else []
    build = ["--build-constraints", str(LOCKS / "build.txt")]
    command = ["install", "--no-deps", "--requirements"] if keep else ["sync"]
    print(f"{folder}: the packages of requirements/{lock.name}", flush=True)
    if pip(folder, *command, str(lock), *build, *settings).returncode:
        # Once more, for uv's reason: what it shows while it installs cannot be kept as well.
        reason = " ".join(pip(folder, *command, str(lock), *build, *settings, capture=True).stderr.split())
        here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        print(
            f"\n=== NOT LOCKED: requirements/{lock.name} cannot be installed with {here}. Installing the newest "
            f"versions within setup.cfg's bounds instead. What uv said: {reason}\n",
            file=sys.stderr,
            flush=True,
        )
        build = []
        options = [*settings, *(VLLM_OPTIONS if name.endswith("vllm") else [])]
        if pip(folder, "install", "--upgrade", *options, "--requirements", str(LOCKS / f"{name}.in")).returncode:
            raise SystemExit(f"The newest versions cannot be installed with {here} either; uv's reasons are above.")
    if package and pip(folder, "install", "--no-deps", *build, *package).returncode:
        raise SystemExit(f"The package could not be installed into {folder}; uv's reason is above.")


def locked(name: str) -> dict[str, list[str]]:
    """Return the versions of each package that requirements/`name`.txt names, for whatever platform."""
    text, versions = (LOCKS / f"{name}.txt").read_text(encoding="utf-8"), defaultdict(list)
    for package, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, re.MULTILINE):
        versions[package].append(version)
    return versions


def newest(folder: Path) -> None:
    """Make an environment in `folder` of the newest release of everything but PyTorch, whatever our cap says.

    Raises:
        SystemExit: if there is no such environment: some package excludes the newest Transformers.
    """
    new_environment(folder)
    torch = [f"{name}=={locked('dev')[name][0]}\n" for name in ("torch", "torchvision")]
    with tempfile.TemporaryDirectory() as work:
        overrides, constraints = Path(work, "overrides.txt"), Path(work, "constraints.txt")
        overrides.write_text("transformers\n", encoding="utf-8")
        constraints.write_text("".join(torch), encoding="utf-8")
        options = ["--refresh", "--overrides", str(overrides), "--constraints", str(constraints)]
        if pip(folder, "install", *options, "--editable", ".[torchvision,training,test]").returncode:
            raise SystemExit("The newest versions do not go together; uv's reason is above.")


def lock(names: Sequence[str], keep: bool = False) -> None:
    """Resolve requirements/NAME.in to requirements/NAME.txt, with the newest versions.

    Args:
        names: of the locks.
        keep: start from the versions of each lock as it is, so that only what its requirements ask for changes.

    Raises:
        SystemExit: if a set of requirements has no solution.
    """
    for name in names:
        start, target = STARTS_FROM[name], LOCKS / f"{name}.txt"
        # uv prefers the versions that it finds in the file that it is to write.
        if not keep:
            target.unlink(missing_ok=True)
        if start is not None and not keep:
            shutil.copy(LOCKS / f"{start}.txt", target)
        options = [*VLLM_OPTIONS, *VLLM_PLATFORM] if name.endswith("vllm") else ["--universal"]
        options += ["--python-version", "3.11", "--no-emit-package", NAME, "--custom-compile-command", "make lock"]
        relative = [str(Path("requirements", f"{name}.{end}")) for end in ("in", "txt")]
        if uv("pip", "compile", *options, relative[0], "--output-file", relative[1]).returncode:
            raise SystemExit(f"requirements/{name}.in could not be resolved; uv's reason is above.")
        print(f"requirements/{name}.txt: {len(target.read_text(encoding='utf-8').splitlines())} lines")


def main() -> None:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("make", help="make or update an environment from a lock")
    verb.add_argument("folder", type=Path)
    verb.add_argument("name", choices=STARTS_FROM)
    verb.add_argument("--package", help="install this wheel, not the checkout")
    verb.add_argument("--keep", action="store_true", help="remove nothing")
    verb = verbs.add_parser("newest", help="make an environment without lock and cap")
    verb.add_argument("folder", type=Path)
    verb = verbs.add_parser("lock", help="make the locks again")
    verb.add_argument("names", nargs="*")
    verb.add_argument("--keep", action="store_true", help="keep the locked versions where the requirements allow them")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - the script runs before anything has checked it
        sys.exit("Python 3.11 or later is needed; run make PYTHON=python3.11 (or later).")
    if arguments.verb == "make":
        package = ["--reinstall", arguments.package] if arguments.package else ["--editable", "."]
        make(arguments.folder.absolute(), arguments.name, package, arguments.keep)
    elif arguments.verb == "newest":
        newest(arguments.folder.absolute())
    else:
        lock(arguments.names or list(STARTS_FROM), arguments.keep)


if __name__ == "__main__":
    main()
