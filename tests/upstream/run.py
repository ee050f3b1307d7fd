#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run Transformers' own model tests against this package, on the version of Transformers that is installed.

The test mixins that every model of Transformers must pass are not in its wheels. This script takes them from the
source distribution of the installed version (fetched once, by pip, and cached), puts the modules in `overlay/` beside
them and runs pytest there. Modules that the source distribution lacks are replaced by empty classes, unless
`overlay/` has one. Every skip has to be explained in `skips.md`; an unexplained one counts as a failure.

    python tests/upstream/run.py                          everything, two processes
    python tests/upstream/run.py -k "Encoder and save"    further arguments go to pytest

Needs the extras `test` and `torchvision`, and this package, installed or in src/.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
REQUIRED = {
    "accelerate": "accelerate",
    "parameterized": "parameterized",
    "pytest": "pytest",
    "timm": "timm",
    "torchvision": "torchvision",
    "xdist": "pytest-xdist",
}

# The test files that overlay/ builds on. What these import in turn is looked for and, where absent, stubbed.
WANTED = (
    "test_backbone_common",
    "test_configuration_common",
    "test_image_processing_common",
    "test_modeling_common",
    "test_pipeline_mixin",
    "test_processing_common",
    "test_training_mixin",
)


def source_distribution(version: str, cache: Path) -> Path:
    """Return the path of Transformers' source distribution, fetching it with pip's own settings if it is not cached.

    Raises:
        SystemExit: if pip cannot fetch it.
    """
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.exists():
        print(f"Fetching the source distribution of transformers {version}", flush=True)
        # Environments of the Makefile have no pip but for the one that holds uv.
        python = sys.executable if importlib.util.find_spec("pip") else REPOSITORY / ".venvs" / "uv" / "bin" / "python"
        fetch = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        result = subprocess.run([*fetch, "--dest", str(cache), f"transformers=={version}"], check=False)
        if result.returncode or not archive.exists():
            raise SystemExit(
                f"pip could not fetch the source distribution of transformers {version}. Put {archive.name} into "
                f"{cache}, or pass --cache with a folder that has it."
            )
    return archive


def build_tree(archive: Path, tree: Path) -> None:
    """Lay out `tree`: the wanted test files of `archive`, then overlay/, then stubs for what is still missing.

    Raises:
        SystemExit: if the archive lacks a wanted file.
    """
    if tree.exists():
        shutil.rmtree(tree)
    tests = tree / "tests"
    tests.mkdir(parents=True)
    wanted = {f"{name}.py" for name in WANTED}
    with tarfile.open(archive) as contents:
        for member in contents:
            parts = Path(member.name).parts
            if parts[1:-1] == ("tests",) and parts[-1] in wanted:
                source = contents.extractfile(member)
                assert source is not None
                (tests / parts[-1]).write_bytes(source.read())
                wanted.discard(parts[-1])
    if wanted:
        raise SystemExit(f"{archive.name} has no tests/{', tests/'.join(sorted(wanted))}.")
    shutil.copytree(HERE / "overlay", tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "skips.md", tree)
    for name in ("tokenizer", "images"):
        shutil.copytree(REPOSITORY / "tests" / "golden" / name, tree / "fixtures" / name)
    # Upstream's files import Transformers "from source"; an empty package there gives them the installed one.
    (tree / "src" / "transformers").mkdir(parents=True)
    (tree / "src" / "transformers" / "__init__.py").touch()
    write_stubs(tests)
    for folder in (tests, *(path for path in tests.rglob("*") if path.is_dir())):
        (folder / "__init__.py").touch()


def write_stubs(tests: Path) -> None:
    """For each `from .package.module import Name` of the files in `tests` that leads nowhere, write an empty class."""
    missing: dict[Path, set[str]] = {}
    for file in tests.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                target = tests.joinpath(*node.module.split(".")).with_suffix(".py")
                if not target.exists():
                    missing.setdefault(target, set()).update(alias.name for alias in node.names)
    for target, names in missing.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n\n".join(f"class {name}:\n    pass" for name in sorted(names)) + "\n", encoding="utf-8")


def main() -> int:
    """Build the tree for the installed version, run pytest in it and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "upstream", help="for what is fetched")
    parser.add_argument("-n", "--processes", default="2", help="test processes, 0 for none beside this one")
    arguments, pytest_arguments = parser.parse_known_args()
    absent = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise SystemExit(f"Missing here: {' '.join(absent)}. Install with: pip install {' '.join(absent)}")

    version = importlib.metadata.version("transformers")
    cache = arguments.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / f"tree-{version}"
    build_tree(source_distribution(version, cache), tree)

    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_TINY_MODEL_PATH": str(tree / "tiny"),
    }
    if arguments.processes != "0":
        environment.setdefault("OMP_NUM_THREADS", "1")
    if importlib.util.find_spec("transformers_fastvlm") is None:
        paths = [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    print(f"Transformers' own tests, version {version}, in {tree}", flush=True)
    command = [sys.executable, "-m", "pytest", "-n", arguments.processes, *pytest_arguments]
    return subprocess.run(command, cwd=tree, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
