# SPDX-License-Identifier: Apache-2.0
"""What the package declares: metadata, versions, licences; its files agree. `make test-wheel` checks the wheel."""

import ast
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import transformers_fastvlm

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    file
    for folder in ("src", "tests", "tools", "examples", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
    if ROOT / "tests" / "golden" not in file.parents
)


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirement_names(text: str) -> list[str]:
    return [re.split(r"[<>=!~;\[ ]", line.strip())[0] for line in text.strip().splitlines()]


def test_pyproject_leaves_metadata_to_setup_cfg(setup_cfg: configparser.ConfigParser) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pyproject) == {"build-system", "tool"}
    assert pyproject["build-system"]["requires"] == ["setuptools>=77"]
    assert setup_cfg["metadata"]["version"] == "attr: transformers_fastvlm._version.__version__"
    assert setup_cfg["options"]["python_requires"] == ">=3.11"
    assert pyproject["tool"]["ruff"]["target-version"] == "py311"
    assert pyproject["tool"]["mypy"]["python_version"] == "3.11"


def test_core_dependencies(setup_cfg: configparser.ConfigParser) -> None:
    core = setup_cfg["options"]["install_requires"]
    assert requirement_names(core) == [
        "transformers",
        "torch",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "pillow",
    ]
    assert "transformers>=5.16.1,<6" in core


def test_one_version_everywhere() -> None:
    version = transformers_fastvlm.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None, "CHANGELOG.md has no version"
    assert newest[1] == version


def test_installed_metadata_is_of_this_checkout(setup_cfg: configparser.ConfigParser) -> None:
    try:
        installed = importlib.metadata.distribution("transformers-fastvlm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package runs from its sources and is not installed, so it has no metadata")
    assert installed.version == transformers_fastvlm.__version__
    declared = {*requirement_names(setup_cfg["options"]["install_requires"])}
    core = [line for line in installed.requires or [] if "extra ==" not in line]
    assert {name.replace("-", "_") for name in requirement_names("\n".join(core))} == declared
    assert {(entry.group, entry.name): entry.value for entry in installed.entry_points} == {
        ("console_scripts", "fastvlm"): "transformers_fastvlm_entry:command",
        ("vllm.general_plugins", "fastvlm"): "transformers_fastvlm_entry:vllm_plugin",
        ("lmms_eval.models", "fastvlm"): "transformers_fastvlm_entry:lmms_eval_manifest",
    }


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["generate", "--nonsense"]])
def test_help_of_the_command_imports_no_torch(arguments: list[str]) -> None:
    """Help and wrong options come at once; only a verb registers, which imports PyTorch."""
    code = f"""
        import atexit, sys
        sys.argv = ["fastvlm", *{arguments!r}]
        heavy = {{"torch", "torchvision", "transformers", "timm", "accelerate"}}
        atexit.register(lambda: print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr))
        import transformers_fastvlm_entry
        assert "transformers_fastvlm" not in sys.modules
        transformers_fastvlm_entry.command()
    """
    env = os.environ | {"PYTHONPATH": str(Path(transformers_fastvlm.__file__).parent.parent)}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == (2 if "--nonsense" in arguments else 0), done.stderr
    assert done.stderr.splitlines()[-1] == "imported: []"


def test_package_is_marked_as_typed() -> None:
    assert (Path(transformers_fastvlm.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_source_file_begins_with_its_licence_and_purpose(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert "# SPDX-License-Identifier: Apache-2.0" in lines[:2], "the licence line is missing"
    assert ast.get_docstring(ast.parse(text)), "the module docstring is missing"


def test_ci_runs_every_target_that_checks_something() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = re.findall(
        r"^(?:step|together) .*make .*$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE
    )
    run = set(re.findall(r"\bmake (?:-k )?([a-z-]+)", "\n".join(steps)))
    assert targets - run == {"help", "format", "clean", "bench-gpu", "test-gpu", "soak", "train-tiny"}
    assert run <= targets
