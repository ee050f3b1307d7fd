# SPDX-License-Identifier: Apache-2.0
"""The package's metadata, versions and licences agree in all files. `make test-wheel` checks the wheel."""

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
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import transformers_fastvlm
from helpers import WARNINGS_ARE_ERRORS

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
    assert "transformers>=5.16.1,<5.25" in core


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
    """Help and errors about options appear at once; only running a verb registers the model, which imports PyTorch."""
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
    command = [sys.executable, *WARNINGS_ARE_ERRORS, "-c", textwrap.dedent(code)]
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


def make_variable(name: str) -> list[str]:
    found = re.search(rf"^{name} := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_ci_runs_every_target_that_checks_something() -> None:
    targets = set(
        re.findall(
            r"^([a-z][a-z-]*)(?: [^:=\n]*)?:(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    run = set(
        re.findall(r"\bmake ([a-z0-9.-]+)", re.sub(r"#.*", "", (ROOT / ".ci" / "run").read_text(encoding="utf-8")))
    )
    versions = {f"test-versions-{version}" for version in make_variable("TRANSFORMERS")}
    assert versions <= run
    by_hand = {"test-gpu", "test-minimal-full", "test-versions", "test-versions-full"}
    tools = {"help", "format", "clean", "bench-gpu", "lock", "soak", "train-tiny", "vllm-cpu"}
    assert targets - run == by_hand | tools
    assert run - versions <= targets


# --- locks ---

LOCKS = ROOT / "requirements"
NAMES = sorted(path.stem for path in LOCKS.glob("*.in"))


def pins(name: str) -> dict[str, list[tuple[str, Marker | None]]]:
    """Return the version of each package in a lock, with its platforms."""
    found: dict[str, list[tuple[str, Marker | None]]] = {}
    for line in (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.lstrip().startswith(("#", "./")):
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "==" and not requirement.url, line
            found.setdefault(canonicalize_name(requirement.name), []).append((only.version, requirement.marker))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_is_exact_and_names_no_address(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    assert re.findall(r"://|^-|^/|file:", text, re.MULTILINE) == []
    assert pins(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "build"])
def test_a_lock_is_of_this_setup_cfg(name: str, setup_cfg: configparser.ConfigParser) -> None:
    """The locks match setup.cfg and requirements/*.in; after changing these, run `make lock`."""
    lines = (LOCKS / f"{name}.in").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "./", "-e"))]
    (own,) = re.findall(r"^-e \.(?:\[(.*)\])?$", "\n".join(lines), re.MULTILINE)
    wanted += setup_cfg["options"]["install_requires"].split("\n")
    for extra in filter(None, own.split(",")):
        wanted += setup_cfg["options.extras_require"][extra].split("\n")
    locked = pins(name)
    for line in filter(None, (line.partition("#")[0].strip() for line in wanted)):
        requirement = Requirement(line)
        # vLLM pins the PyTorch version of its build.
        versions = locked.get(canonicalize_name(requirement.name), [])
        assert versions, f"{line}: not in requirements/{name}.txt; run make lock"
        for version, _ in versions:
            assert requirement.specifier.contains(version), f"{line}: {version} is locked in {name}.txt; run make lock"


def test_demo_and_suite_agree() -> None:
    """`make demo` and `make test` share an environment: the former removes no package of the latter."""
    suite = pins("dev")
    for name in ("package", "minimal"):
        for package, found in pins(name).items():
            assert {version for version, _ in found} == {version for version, _ in suite[package]}, package


def test_each_version_that_is_tested_has_its_lock(setup_cfg: configparser.ConfigParser) -> None:
    tested = [pins(f"transformers-{version}")["transformers"][0][0] for version in make_variable("TRANSFORMERS")]
    newest = pins("dev")["transformers"][0][0]
    declared = re.search(r"^transformers>=(\S+),<5\.(\d+)$", setup_cfg["options"]["install_requires"], re.MULTILINE)
    assert declared is not None
    assert tested[0] == declared[1], "the oldest is the lower bound"
    assert newest.startswith(f"5.{int(declared[2]) - 1}."), "the cap is the minor version after the one of `make test`"
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert ", ".join([*tested, newest]) in page
    torch, torchvision = (pins("dev")[package][0][0] for package in ("torch", "torchvision"))
    assert f"| {torch} | {torchvision} |" in page
