# SPDX-License-Identifier: Apache-2.0
"""Links of the pages lead somewhere, and the reference and its tables say what the package has."""

import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import transformers_fastvlm
from transformers_fastvlm import FastViTHDConfig, FastVLMConfig
from transformers_fastvlm.images import anyres

ROOT = Path(__file__).parent.parent
FOR_DEVELOPERS = ("development.md",)
"""Files of docs/ that are not pages of the site."""
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in FOR_DEVELOPERS]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/development.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *DOCS,
]
PACKAGE = "transformers_fastvlm"
NO_API = ("cli", "images", "kernels", "storage", "vllm_plugin")
"""Packages whose names are for this project alone."""
PACKAGES = [
    transformers_fastvlm,
    *(
        importlib.import_module(f"{PACKAGE}.{found.name}")
        for found in pkgutil.iter_modules(transformers_fastvlm.__path__)
        if found.ispkg and found.name not in NO_API
    ),
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^( *)(```|~~~).*?^\1\2", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, where GitHub and MkDocs make the same of them."""
    headings = re.findall(r"^#+ +(.+?) *$", without_code(page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_navigation() -> None:
    nav = read("mkdocs.yml").split("nav:")[1]
    assert [page.name for page in DOCS if not re.search(rf" {re.escape(page.name)}$", nav, flags=re.M)] == []
    assert len(re.findall(r"^  - ", nav, flags=re.M)) == 5


@pytest.mark.parametrize("page", [page for page in DOCS if page.name != "index.md"], ids=lambda page: page.name)
def test_pages_say_what_they_are_for_and_where_to_go_next(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[1] == "" and lines[2][0].isalpha(), "a title, then a sentence"
    headings = [line for line in lines if line.startswith("## ")]
    assert headings[-1] == "## Next" and lines[-1].startswith(("- ", "  "))


NO_TABS = {
    "embeddings.md": "the command embeds files, the programs embed inputs of any kind",
    "gallery.md": "only makes images",
    "migration.md": "each block stands for one foreign program",
    "quantization.md": "the command only installs",
    "training-recipes.md": "the command and the program make different models",
    "evaluation-report.md": "the program needs no run",
    "structured-answers.md": "commands and programs have sections",
    "tiny-model.md": "the program shows a scene's right answer",
    "vllm.md": "the commands are vLLM's",
}
"""Pages whose Python does something else than their commands."""


@pytest.mark.parametrize("page", [page for page in DOCS if page.name not in NO_TABS], ids=lambda page: page.name)
def test_pages_with_python_and_commands_have_tabs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if re.search(r"^ *```python", text, flags=re.M) and re.search(r"^ *(fastvlm|curl) ", text, flags=re.M):
        assert '=== "Python"' in text and '=== "Command line"' in text


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_say_image(page: Path) -> None:
    assert re.findall(r"(?i)\bpictures?\b", page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= (200 if page.name == "README.md" else 250)


def named_by(path: str) -> object:
    """Return the object with a dotted path, as a `::: path` line of the reference gives it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_reference_has_every_public_name(package: ModuleType) -> None:
    paths = [path for page in DOCS for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), flags=re.M)]
    reference = [(path.rpartition(".")[2], named_by(path)) for path in paths if path.startswith(PACKAGE)]
    missing = [
        f"::: {getattr(getattr(package, name), '__module__', package.__name__)}.{name}"
        for name in package.__all__
        if not any(name == other and getattr(package, name) is value for other, value in reference)
    ]
    assert missing == [], "put these lines on a page docs/api*.md"


@pytest.mark.parametrize("config", [FastVLMConfig, FastViTHDConfig])
def test_docstrings_name_every_field_of_the_configurations(config: type) -> None:
    fields = [name for name, kind in config.__annotations__.items() if "ClassVar" not in str(kind)]
    assert [name for name in fields if not name.startswith("_") and f" {name}: " not in (config.__doc__ or "")] == []


def test_the_walks_of_development_name_files_and_functions_that_exist() -> None:
    walks = read("docs/development.md").split("## Four walks")[1].split("\n## ")[0]
    steps = re.findall(r"`([\w/]+\.py)`((?:(?:,| and)? `\w+`)*)", walks)
    assert len(steps) >= 25
    missing = []
    for file, names in steps:
        source = ROOT / "src" / PACKAGE / file
        text = source.read_text(encoding="utf-8") if source.is_file() else ""
        missing += [file] if not text else []
        missing += [
            f"{file}: {name}" for name in re.findall(r"\w+", names) if not re.search(rf"(def|class) {name}\b", text)
        ]
    assert missing == []


def test_table_of_tokens() -> None:
    side, tokens = re.findall(r"^\| (?:side|tokens) \|(.+)\|$", read("docs/images.md"), flags=re.M)
    for number, expected in zip(side.split("|"), tokens.split("|"), strict=True):
        assert anyres.num_image_tokens((480, 640), None, int(number)) == int(expected)


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_github_files_are_yaml_and_name_targets_that_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    targets = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), flags=re.M))
    called = {word for line in re.findall(r"run: make (.+)", text) for word in line.split() if word.isidentifier()}
    for job in content.get("jobs", {}).values():
        called |= {
            word for line in job.get("strategy", {}).get("matrix", {}).get("target", []) for word in line.split()
        }
    assert called - targets == set()


def test_changes_are_told_in_three_lines() -> None:
    bullets = re.findall(r"^- .*(?:\n  .*)*", read("CHANGELOG.md"), flags=re.M)
    assert len(bullets) > 50
    assert [bullet for bullet in bullets if bullet.count("\n") > 2] == []
