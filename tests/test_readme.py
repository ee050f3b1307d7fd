# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ show works: their Python and commands run, and their options and extras exist.

A Python block runs if the line before it is `<!-- test -->`, or `<!-- test with PACKAGE -->` where that is installed;
readers do not see the mark. Every other Python block is a fragment, and its first line says so to the reader:
`# Fragment: …`. The marked blocks of a page run in order as one program, as somebody who follows the page would run
them, in a folder of their own, with these substitutions and no others:

- "apple/FastVLM-0.5B" is replaced by the path of a tiny checkpoint in the same layout, rebuilt from tests/golden, so
  that no network is needed;
- every image that a block names, such as "photo.jpg", is there: of examples/images where it has one of that name, else
  a golden image of the same file type. The folder "photos" has some.

The commands of `RUN` run too, in such a folder; those marked with PACKAGE, where that is installed. Other commands have
runs of their own (`make demo`, the tests of their verbs). `# prints: TEXT` at the end of a line of Python, or on the
line after a command, is compared with what is printed; so is a block of `text` that follows a block of Python.
"""

import configparser
import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
MARK = "<!-- test -->"
HUB_NAME = "apple/FastVLM-0.5B"
RUN = ("generate", "chat", "info", "convert")
"""Verbs whose commands run: they need no other package, no port, and seconds."""
PROGRAMS = {
    "training.md": "tests/training/test_training_docs.py",
    "training-recipes.md": "tests/training/test_training_docs.py",
    "training-scale.md": "tests/training/test_lora_docs.py",
    "export.md": "tests/export/test_onnx_docs.py",
    "serve.md": "tests/server/test_http_docs.py",
}
"""Pages whose blocks `<!-- test with PACKAGE -->` run in a test of their own, with more files than are here."""
PICTURES = {".jpg": "large_rgb.jpg", ".jpeg": "large_rgb.jpg", ".png": "square_rgb.png"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass
class Block:
    """A fenced block: its language, its code, the line of its first line in the page, and its mark.

    `needs` is the package of `<!-- test with PACKAGE -->`; `marked` is set for `<!-- test -->` alone. `printed` is the
    block of `text` that follows one of Python, with nothing but empty lines between.
    """

    language: str
    code: str
    line: int
    marked: bool
    needs: str | None = None
    printed: str | None = None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown page."""
    found = list(fenced(text))
    lines = text.splitlines()
    for block, after in pairwise(found):
        between = lines[block.line + block.code.count("\n") + 1 : after.line - 2]
        if block.language == "python" and after.language == "text" and not any(line.strip() for line in between):
            block.printed = after.code
    return found


def fenced(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown page, each without what it prints."""
    lines = text.splitlines()
    start, fence, indent = 0, "", ""
    for number, line in enumerate(lines):
        found = re.match(r"( *)(```+|~~~+)(.*)$", line)
        if not fence and found:
            start, (indent, fence, language) = number, found.groups()
        elif fence and line.strip() == fence:
            code = "\n".join(inner.removeprefix(indent) for inner in lines[start + 1 : number])
            above = next((other.strip() for other in reversed(lines[:start]) if other.strip()), "")
            needs = re.fullmatch(r"<!-- test with (\w+) -->", above)
            yield Block(language.strip(), code, start + 2, above == MARK, needs and needs[1])
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


@pytest.fixture
def folder(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make a working directory with the images that a text names, and "photos"."""

    def make(text: str) -> Path:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(ROOT / "examples" / "images", tmp_path / "examples" / "images")
        (tmp_path / "photos").mkdir()
        shutil.copy(ROOT / "examples" / "images" / "sign.png", tmp_path / "photos")
        for name in re.findall(r"(?<![\w./-])([\w.-]+\.(?:jpe?g|png))(?![\w.-])", text):
            drawn = ROOT / "examples" / "images" / name
            shutil.copy(drawn if drawn.is_file() else golden / "images" / PICTURES[Path(name).suffix], tmp_path / name)
        return tmp_path

    return make


@each_page
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # of PyTorch, where there is no GPU
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # of TRL, with Transformers 5.23
def test_python_runs(
    page: Path,
    checkpoint: Callable[[str], Path],
    folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    python = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language == "python"]
    for block in python:
        compile("\n" * (block.line - 1) + block.code, page.name, "exec")
    elsewhere = page.name in PROGRAMS
    marked = [block for block in python if block.marked or (runs_here(block) and not elsewhere)]
    folder("\n".join(block.code for block in marked))
    namespace = {"__name__": "__main__"}
    for block in marked:
        code = block.code
        if HUB_NAME in code:
            code = code.replace(HUB_NAME, checkpoint("qwen2_tied").as_posix())
        capsys.readouterr()
        # Padding makes the line numbers of a traceback those of the page.
        exec(compile("\n" * (block.line - 1) + code, page.name, "exec"), namespace)
        expected = re.findall(r"# prints: (.*)$", block.code, flags=re.M)
        if expected := (block.printed or "").splitlines() or expected:
            assert capsys.readouterr().out.splitlines() == expected


def runs_here(block: Block) -> bool:
    return block.needs is not None and importlib.util.find_spec(block.needs) is not None


@each_page
def test_fragments_say_so(page: Path) -> None:
    python = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language == "python"]
    if page.name in PROGRAMS:
        assert (ROOT / PROGRAMS[page.name]).is_file()
    silent = [
        f"line {block.line}: neither marked to run nor `# Fragment: …`"
        for block in python
        if not (block.marked or block.needs or block.code.startswith("# Fragment: "))
    ]
    assert silent == []


@each_page
def test_commands_run(page: Path, checkpoint: Callable[[str], Path], folder: Callable[[str], Path]) -> None:
    text = page.read_text(encoding="utf-8")
    shell = [block for block in blocks(text) if block.language == "bash"]
    where = folder("\n".join(block.code for block in shell))
    for block in shell:
        lines = block.code.replace("\\\n", " ").splitlines() if block.needs is None or runs_here(block) else []
        for line, after in zip(lines, [*lines[1:], ""][: len(lines)], strict=True):
            words = shlex.split(line, comments=True)
            if words[:1] != ["fastvlm"] or words[1] not in RUN or "cuda" in words:
                continue
            printed = fastvlm(words[1:], checkpoint("qwen2_tied"), where)
            if after.startswith("# prints: "):
                assert printed.splitlines() == [after.removeprefix("# prints: ")], line


def fastvlm(words: list[str], golden_model: Path, where: Path) -> str:
    """Run a command of a page and return what it prints."""
    from typer.testing import CliRunner

    from transformers_fastvlm.cli import app

    given = b""
    if "<" in words:
        at = words.index("<")
        given, words = (where / words[at + 1]).read_bytes(), words[:at]
    words = [word.replace(HUB_NAME, str(golden_model)) for word in words]
    option = next((word for word in words if word in ("-m", "--model")), None)
    named = words[words.index(option) + 1] if option else words[1] if words[0] in ("info", "convert") else None
    if named is None:
        words += ["--model", str(golden_model)]
    elif named != "tiny" and not Path(named).is_dir():  # what somebody trained or converted before
        shutil.copytree(golden_model, named)
    if words[0] in ("generate", "chat") and "tiny" not in words:
        words += ["--max-new-tokens", "4"]
    result = CliRunner().invoke(app, words, input=given, prog_name="fastvlm")
    assert result.exit_code == 0, (words, result.stdout, result.stderr)
    return result.stdout


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
    text += "<!-- test with peft -->\n\n```python\nz = 1\n```\n\n```text\n1\n2\n```\n"
    assert [block.printed for block in blocks(text)] == [None, None, None, "1\n2", None]
    assert [(b.language, b.marked, b.needs, b.line) for b in blocks(text)] == [
        ("python", True, None, 6),
        ("python", False, None, 10),
        ("bash", False, None, 14),
        ("python", False, "peft", 22),
        ("text", False, None, 26),
    ]
    assert commands(text) == [
        ["make", "demo"],
        ["fastvlm", "generate", "a.png", "-p", "two; words", "--json"],
        ["make", "test"],
        ["make", "check"],
    ]
