# SPDX-License-Identifier: Apache-2.0
"""Links of the pages lead somewhere, and the reference and its tables say what the package has."""

import re
from pathlib import Path

import pytest

import transformers_fastvlm
from transformers_fastvlm import FastViTHDConfig, FastVLMConfig, checkpoints, data, registration, training
from transformers_fastvlm.images import anyres

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


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
    assert [page.name for page in DOCS if not re.search(rf": {re.escape(page.name)}$", nav, flags=re.M)] == []


def test_reference_names_everything_public() -> None:
    reference = read("docs/api.md")
    parts = (transformers_fastvlm, checkpoints, data, training)
    public = [*(name for part in parts for name in part.__all__), registration.NO_VISION2SEQ]
    # Layout is the type of convert()'s argument, whose values are listed.
    assert [name for name in public if name not in reference and name != "Layout"] == []


@pytest.mark.parametrize("config", [FastVLMConfig, FastViTHDConfig])
def test_reference_names_every_field_of_the_configurations(config: type) -> None:
    section = read("docs/api.md").split(f"### {config.__name__}\n")[1].split("\n##")[0]
    fields = [name for name, kind in config.__annotations__.items() if "ClassVar" not in str(kind)]
    fields = [name for name in fields if not name.startswith("_") and name not in ("model_type", "base_config_key")]
    assert [name for name in fields if f"`{name}`" not in section] == []


def test_table_of_tokens() -> None:
    side, tokens = re.findall(r"^\| (?:side|tokens) \|(.+)\|$", read("docs/concepts.md"), flags=re.M)
    for number, expected in zip(side.split("|"), tokens.split("|"), strict=True):
        assert anyres.num_image_tokens((480, 640), None, int(number)) == int(expected)
