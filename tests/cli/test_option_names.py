# SPDX-License-Identifier: Apache-2.0
"""Options of all verbs: one name for one thing, the same defaults, and earlier names that still work."""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from transformers_fastvlm.cli import app
from transformers_fastvlm.cli.plain_help import EARLIER_NAMES

Run = Callable[..., Any]


def options_of(command: Any, verb: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (verb, option) for every option of every verb."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from options_of(inner, f"{verb} {name}".strip())
        return
    yield from ((verb, parameter) for parameter in command.params if parameter.param_type_name == "option")


OPTIONS = list(options_of(typer.main.get_command(app)))

ONE_NAME = {
    r"answered together|encoded together|Batch sizes": ("--batch-size",),
    r"^JSON file for|^Directory for (the results|report)|^File to write": ("--output",),
    r"^Random seed": ("--seed",),
    r"^Maximum tokens of an answer": ("--max-new-tokens", "--max-answer-tokens"),
    r"^Maximum (total )?pixels": ("--max-pixels",),
    r"pixels.*multiple of 64|^Image sizes": ("--size",),
    r"\bdtype\b|float32, bfloat16": ("--dtype",),
    r"^auto \(CUDA": ("--device",),
    r"precisions?\b": ("--precision",),
    r"^Address to listen": ("--host",),
    r"^Port to listen": ("--port",),
    r"^Folder that .* relative to": ("--image-folder",),
    r"\bonly this many": ("--limit",),
    r"^Print (one )?JSON": ("--json",),
}
"""A pattern of help texts, and the names that an option with such a text may have. --max-answer-tokens is a limit for
other people's requests, not the length of one answer."""

BELONG_TO_ANOTHER = {"--image": "image", "--page": "page", "--prompt": "prompt", "--text": "text"}
"""Names that are the first words of longer ones, which are about a part of the same thing."""

OTHER_DEFAULTS = {
    "--engine": "a benchmark measures generate() unless engines are named",
    "--batch-size": "a server's requests wait for each other; a benchmark measures one image first",
    "--max-new-tokens": "answers to benchmarks are short",
    "--max-pixels": "a server reads images of strangers",
    "--model": "data check counts tokens only if a model is given",
    "--prompt": "an image is embedded without a text unless one is given",
    "--port": "the web page and the server may run together",
    "--seed": "an answer is sampled anew unless a seed is given; figures must repeat",
    "--show": "a switch of train, a number of rows for data check",
    "--to": "an adapter is merged into the layout that everything reads",
}


@pytest.mark.parametrize(("pattern", "names"), ONE_NAME.items(), ids=[names[0] for names in ONE_NAME.values()])
def test_one_thing_has_one_name(pattern: str, names: tuple[str, ...]) -> None:
    found = [(verb, option.opts[0]) for verb, option in OPTIONS if re.search(pattern, option.help)]
    assert found and [(verb, name) for verb, name in found if name not in names] == []


def test_options_are_called_as_their_parameters() -> None:
    names = defaultdict(set)
    for _, option in OPTIONS:
        names[option.name].add(tuple(option.opts))
    assert {name: found for name, found in names.items() if len(found) > 1} == {}


def test_no_name_is_the_beginning_of_another() -> None:
    names = sorted({option.opts[0] for _, option in OPTIONS})
    pairs = [(one, other) for one, other in itertools.permutations(names, 2) if f"{other}-".startswith(f"{one}-")]
    assert [pair for pair in pairs if pair[0] not in BELONG_TO_ANOTHER] == []


def test_defaults_are_the_same() -> None:
    defaults = defaultdict(set)
    for _, option in OPTIONS:
        defaults[option.opts[0]].add(str(option.default))
    assert {name for name, found in defaults.items() if len(found) > 1} - set(OTHER_DEFAULTS) == set()


@pytest.mark.parametrize("verb", sorted({verb for verb, _ in OPTIONS}))
def test_earlier_names_are_in_no_help(run: Run, verb: str) -> None:
    shown = run(*verb.split(), "--help").stdout
    own = {name for other, option in OPTIONS if other == verb for name in option.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown))
    assert named & (set(EARLIER_NAMES) - own) == set()


@pytest.mark.parametrize(
    ("words", "today"),
    [
        (("bench", "--batch", "0"), "batch is 0; expected at least 1"),
        (("bench", "--out", "gone/bench.json"), "--output is gone/bench.json, but there is no directory gone"),
        (("bench", "--out=gone/bench.json"), "--output is gone/bench.json, but there is no directory gone"),
        (("eval", "tiny", "--out", "x", "--batch", "3", "--prompt", "In one word."), "give either --tasks"),
        (("new", "x", "--vision", "tiny", "--language-model", "tiny", "--image-size", "100"), "image_size is 100"),
    ],
)
def test_earlier_names_work_without_a_warning(fails: Callable[..., str], words: tuple[str, ...], today: str) -> None:
    assert today in fails(*words)


def test_an_option_that_is_called_like_an_earlier_name_is_itself(run: Run, golden: Path) -> None:
    image = golden / "images" / "square_rgb.png"
    shown = run("generate", image, "--prompt", "What is it?", "-m", "tiny", "--max-new-tokens", 2, "--json")
    assert json.loads(shown.stdout)["prompt"] == "What is it?"
