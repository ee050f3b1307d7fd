# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: from the command line down to the configuration, never back, and never between siblings."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "transformers_fastvlm"
SOURCE = Path(__file__).parent.parent / "src" / PACKAGE

# Top to bottom. A module may import lower layers only. "" is the package itself, as in
# `from transformers_fastvlm import FastVLMConfig`.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("batch", "bench", "demo", "evaluation", "export", "server", "training"),
    ("embedding",),
    ("data", "engines"),
    ("vllm_plugin",),
    ("",),
    ("registration",),
    ("checkpoints", "inference"),
    ("modeling_fastvlm", "processing_fastvlm"),
    ("image_processing_fastvlm", "modeling_fastvithd"),
    ("generation_fastvlm", "outputs_fastvlm", "parallel_training", "strict_loading"),
    ("image_processing_pil_fastvlm",),
    ("image_processing_common",),
    ("configuration_fastvlm",),
    ("conversations",),
    ("images",),
    ("compat", "configuration_checks", "kernels", "storage", "tensor_names", "tokens"),
    ("checkpoint_files",),
    ("_optional", "_version", "random_streams"),
)
# Neither side imports the other, regardless of the layers. From images/ the model may import AnyRes only.
ANYRES = f"{PACKAGE}.images.anyres"
MODELING = {
    "generation_fastvlm",
    "kernels",
    "modeling_fastvithd",
    "modeling_fastvlm",
    "outputs_fastvlm",
    "parallel_training",
    "strict_loading",
}
PROCESSING = {
    "conversations",
    "image_processing_common",
    "image_processing_fastvlm",
    "image_processing_pil_fastvlm",
    "processing_fastvlm",
}

CORE_DEPENDENCIES = {"transformers", "torch", "safetensors", "tokenizers", "huggingface_hub", "PIL", "numpy"}
# packaging, rich, typer and PyYAML are dependencies of Transformers; one part of the package uses each.
DEPENDENCIES_OF_UNIT = {
    "cli": {"rich", "typer"},
    "compat": {"packaging"},
    "image_processing_fastvlm": {"torchvision"},
    "server": {"h11", "uvicorn"},  # imported when a server starts
    "training": {"yaml"},
    "vllm_plugin": {"vllm"},  # vLLM itself imports this part
}

LONGEST = 600
# The encoder is best read in one file; code of modeling_fastvlm.py that is not part of the model belongs elsewhere.
LONG_FILES = {"modeling_fastvithd.py"}

RANK = {unit: rank for rank, layer in enumerate(reversed(LAYERS)) for unit in layer}


def unit_of(module: str) -> str:
    """Return the part of the package that contains `module`, a full dotted name; "" is the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_name(file: Path, root: Path) -> str:
    parts = (root.name, *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """Yield (full dotted name, line, whether it runs on import) of each import, lazy ones inside functions included.

    `from a import b` yields `a.b`: whether b is a module or a name in one does not change the unit it belongs to.
    """
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) not in lazy


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def violations(root: Path) -> list[str]:
    """Return one sentence for each import under the package folder `root` that its place in LAYERS forbids."""
    units = {unit_of(module_name(file, root)) for file in root.rglob("*.py")}
    found = [
        f"{unit}: new here; give it a place in LAYERS of tests/test_layering.py" for unit in sorted(units - set(RANK))
    ]
    for file in sorted(root.rglob("*.py")):
        module = module_name(file, root)
        unit = unit_of(module)
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        for name, line, runs_on_import in imports_of(tree, module, file.name == "__init__.py"):
            place = f"{file.relative_to(root)}:{line}"
            top = name.split(".")[0]
            if top == root.name:
                # The last part of `from transformers_fastvlm import FastVLMConfig` is a name, not a unit.
                target = unit_of(name) if unit_of(name) in units | set(RANK) else ""
                if unit == target or unit not in RANK or target not in RANK:
                    continue
                crosses = {unit, target} & MODELING and {unit, target} & PROCESSING
                crosses = crosses or (unit in MODELING and target == "images" and not name.startswith(ANYRES))
                if crosses or RANK[target] >= RANK[unit]:
                    found.append(f"{place}: {unit or 'the package'} must not import {target or 'the package'}")
            elif runs_on_import and top not in sys.stdlib_module_names:
                allowed = CORE_DEPENDENCIES | DEPENDENCIES_OF_UNIT.get(unit, set())
                if top not in allowed:
                    found.append(
                        f"{place}: {top} is not a core dependency; import it inside the function that needs it"
                    )
    return found


def circles(root: Path) -> list[set[str]]:
    """Return the sets of modules under `root` that import each other, on import, in functions, or for types alone."""
    files = {module_name(file, root): file for file in sorted(root.rglob("*.py"))}
    imported: dict[str, set[str]] = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        names = {name for name, _, _ in imports_of(tree, module, file.name == "__init__.py")}
        # The last part of `from .samples import load` is a name, not a module.
        imported[module] = {name if name in files else name.rpartition(".")[0] for name in names} & files.keys()
    reached = {module: _reached(imported, module) for module in imported}
    found = [{other for other in reached[module] if module in reached[other]} for module in files]
    return [
        {module.removeprefix(f"{root.name}.") for module in circle}
        for index, circle in enumerate(found)
        if circle and circle not in found[:index]
    ]


def _reached(imported: dict[str, set[str]], start: str) -> set[str]:
    """Return all modules reachable from one; itself only through others, or by importing itself."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = imported[waiting.pop()] - found
        found |= fresh
        waiting += fresh
    return found


def test_imports_point_down() -> None:
    assert violations(SOURCE) == []


def test_no_modules_import_each_other() -> None:
    assert circles(SOURCE) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "from .b import x", "b": "from .c import y", "c": "from . import d", "d": ""}, []),
        ({"a": "from .b import x", "b": "from . import a"}, [{"a", "b"}]),
        ({"a": "from .b import x", "b": "def f():\n    from .a import y"}, [{"a", "b"}]),
        ({"a": "import transformers_fastvlm.b", "b": "from .c import z", "c": "from .a import x"}, [{"a", "b", "c"}]),
        ({"a": "from .b import x", "b": "from .a import y", "c": "from .d import f", "d": "from .c import g"}, 2),
        (
            {"room.a": "from . import b", "room.b": "from .a import x", "c": "from .room import a"},
            [{"room.a", "room.b"}],
        ),
        ({"room.__init__": "from .a import x", "room.a": "from . import x"}, [{"room", "room.a"}]),
        ({"room.__init__": "from .a import x", "room.a": "from . import b", "room.b": ""}, []),
    ],
)
def test_the_check_of_circles(tmp_path: Path, sources: dict[str, str], expected: list[set[str]] | int) -> None:
    root = tmp_path / PACKAGE
    (root / "room").mkdir(parents=True)
    (root / "room" / "__init__.py").touch()
    for name, source in sources.items():
        (root / f"{name.replace('.', '/')}.py").write_text(source)
    assert (len(circles(root)) if isinstance(expected, int) else circles(root)) == expected


def test_a_files_name_is_its_own_and_no_file_is_long() -> None:
    files = [file for file in sorted(SOURCE.rglob("*.py")) if file.name != "__init__.py"]
    names = Counter(file.name for file in files)
    assert [name for name, count in names.items() if count > 1] == []
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name for name, count in lines.items() if count > LONGEST} <= LONG_FILES


def test_only_compat_asks_for_versions_and_names_of_transformers() -> None:
    asks = ("inspect.signature(", "transformers.__version__", "Version(")
    found = [
        f"{file.relative_to(SOURCE)}:{number}"
        for file in sorted(SOURCE.rglob("*.py"))
        if file != SOURCE / "compat.py"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if any(ask in line for ask in asks)
    ]
    assert found == []


def test_layers_name_each_unit_once() -> None:
    units = [unit for layer in LAYERS for unit in layer]
    assert len(units) == len(set(units))


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("modeling_fastvlm.py", "from .processing_fastvlm import FastVLMProcessor", "must not import processing"),
        ("modeling_fastvlm.py", "from .images import reading", "must not import images"),
        ("modeling_fastvlm.py", "from .images import anyres", None),
        ("processing_fastvlm.py", "from . import modeling_fastvlm", "must not import modeling"),
        ("processing_fastvlm.py", "from .modeling_fastvithd import X", "must not import modeling_fastvithd"),
        ("configuration_fastvlm.py", "import transformers_fastvlm.checkpoints.tables", "must not import checkpoints"),
        ("images/anyres.py", "from transformers_fastvlm import FastVLMConfig", "must not import the package"),
        ("training/loop.py", "from ..evaluation import vqa", "must not import evaluation"),
        ("training/__init__.py", "from ..evaluation import vqa", "must not import evaluation"),
        ("checkpoints/apple.py", "def f():\n    from ..inference.fuse import fuse", "must not import inference"),
        ("checkpoints/apple.py", "from ..modeling_fastvlm import FastVLMModel", None),
        ("checkpoints/apple.py", "from .tables import APPLE", None),
        ("cli/main.py", "from ..training import loop\nimport typer", None),
        ("modeling_fastvlm.py", "import timm", "timm is not a core dependency"),
        ("modeling_fastvlm.py", "def f():\n    import timm", None),
        ("modeling_fastvlm.py", "import torch.nn as nn\nfrom .modeling_fastvithd import FastViTHDModel", None),
        ("odds.py", "", "odds: new here"),
    ],
)
def test_the_check_itself(tmp_path: Path, file: str, source: str, expected: str | None) -> None:
    root = tmp_path / PACKAGE
    for name in ("", "checkpoints", "evaluation", "images", "inference", "training"):
        (root / name).mkdir()
        (root / name / "__init__.py").touch()
    for name in ("processing_fastvlm", "modeling_fastvlm", "modeling_fastvithd"):
        (root / f"{name}.py").touch()
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(source)
    found = violations(root)
    assert (found == []) if expected is None else (len(found) == 1 and expected in found[0]), found
