# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ show works: their Python runs, and their commands, options and extras exist.

A Python block runs if the line before it is `<!-- test -->`, which readers do not see. The marked blocks of a page run
in order as one program, as somebody who follows the page would run them, in a folder of their own, with these
substitutions and no others:

- "apple/FastVLM-0.5B" is replaced by the path of a tiny checkpoint in the same layout, rebuilt from tests/golden, so
  that no network is needed;
- every picture that a block names, such as "photo.jpg", is there: a golden image of the same file type.

Blocks without the mark are only compiled. Commands are not run; `make demo` and others have runs of their own.
"""

import configparser
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = "<!-- test -->"
HUB_NAME = "apple/FastVLM-0.5B"
PICTURES = {".jpg": "large_rgb.jpg", ".jpeg": "large_rgb.jpg", ".png": "square_rgb.png"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass
class Block:
    """A fenced block: its language, its code, the line of its first line in the page, and whether it is marked."""

    language: str
    code: str
    line: int
    marked: bool


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown page."""
    lines = text.splitlines()
    start, fence, indent = 0, "", ""
    for number, line in enumerate(lines):
        found = re.match(r"( *)(```+|~~~+)(.*)$", line)
        if not fence and found:
            start, (indent, fence, language) = number, found.groups()
        elif fence and line.strip() == fence:
            code = "\n".join(inner.removeprefix(indent) for inner in lines[start + 1 : number])
            above = next((other.strip() for other in reversed(lines[:start]) if other.strip()), "")
            yield Block(language.strip(), code, start + 2, above == MARK)
            fence = ""
    assert not fence, f"the block that begins in line {start + 1} does not end"


def commands(text: str) -> list[list[str]]:
    """Return the commands of shell blocks and of inline code, each split into words, without prompts and comments."""
    found = re.findall(r"`((?:make|fastvlm) [^`\n]+)`", re.sub(r"^( *)(```|~~~).*?^\1\2", "", text, flags=re.M | re.S))
    for block in blocks(text):
        if block.language in ("bash", "sh", "shell", "console"):
            lines = block.code.replace("\\\n", " ").splitlines()
            if block.language == "console":
                lines = [line for line in lines if line.startswith("$ ")]
            found += [line.removeprefix("$ ") for line in lines]
    split: list[list[str]] = []
    for line in found:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        split.append([])
        for word in lexer:
            if word in ("&&", "||", "|", ";"):
                split.append([])
            else:
                split[-1].append(word)
    return [words for words in split if words]


def test_pages_are_found_and_something_runs() -> None:
    assert [page.name for page in PAGES if not page.is_file()] == []
    readme = list(blocks(PAGES[0].read_text(encoding="utf-8")))
    assert [block for block in readme if block.marked], f"no block of README.md is marked with {MARK}"


@each_page
def test_python_runs(
    page: Path,
    checkpoint: Callable[[str], Path],
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    python = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language == "python"]
    for block in python:
        compile("\n" * (block.line - 1) + block.code, page.name, "exec")
    marked = [block for block in python if block.marked]
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\"']([\w.-]+\.(?:jpe?g|png))[\"']", "\n".join(block.code for block in marked)):
        shutil.copy(golden / "images" / PICTURES[Path(name).suffix], name)
    namespace = {"__name__": "__main__"}
    for block in marked:
        code = block.code
        if HUB_NAME in code:
            code = code.replace(HUB_NAME, checkpoint("qwen2_tied").as_posix())
        # Padding makes the line numbers of a traceback those of the page.
        exec(compile("\n" * (block.line - 1) + code, page.name, "exec"), namespace)


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        word
        for command in commands(page.read_text(encoding="utf-8"))
        if command[0] == "make"
        for word in command[1:]
        if not word.startswith("-") and "=" not in word
    }
    assert named - targets == set()
    if page.name == "README.md":
        assert {"demo", "test"} <= named


@each_page
def test_extras_exist(page: Path) -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = re.findall(r"(?:transformers-fastvlm|\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8"))
    assert {extra for names in named for extra in names.split(",")} <= set(setup["options.extras_require"])


@each_page
def test_scripts_exist(page: Path) -> None:
    calls = [c for c in commands(page.read_text(encoding="utf-8")) if c[0] in ("python", "python3") and len(c) > 1]
    assert [call[1] for call in calls if call[1].endswith(".py") and not (ROOT / call[1]).is_file()] == []


@each_page
def test_cli_verbs_and_options_exist(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        if command[0] != "fastvlm":
            continue
        # `data` is a group of verbs.
        verb = [word for word in command[1 : 3 if command[1] == "data" else 2] if not word.startswith("-")]
        usage = help_of(verb, monkeypatch, capsys)
        options = [word.split("=")[0] for word in command[1:] if re.match(r"--?[a-z]", word)]
        unknown = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", usage)]
        assert unknown == [], f"{shlex.join(command)}: not in the help of fastvlm {' '.join(verb)}\n{usage}"


def help_of(verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `fastvlm VERB --help` prints; it must exit with 0."""
    from transformers_fastvlm.cli import main

    for name, value in {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["fastvlm", *verb, "--help"])
    status: object = None
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert not status, f"fastvlm {' '.join(verb)} --help exited with {status}: {printed.err}"
    return printed.out


def test_the_reading_of_pages() -> None:
    text = (
        f"`make demo`\n\n{MARK}\n\n```python\nx = 1\n```\n\n```python\ny = (\n)\n```\n"
        "```bash\n# a comment\n$ fastvlm generate a.png \\\n  -p 'two; words' --json   # and so on\n"
        "make test && make check\n```\n"
    )
    assert [(b.language, b.marked, b.line) for b in blocks(text)] == [
        ("python", True, 6),
        ("python", False, 10),
        ("bash", False, 14),
    ]
    assert commands(text) == [
        ["make", "demo"],
        ["fastvlm", "generate", "a.png", "-p", "two; words", "--json"],
        ["make", "test"],
        ["make", "check"],
    ]
