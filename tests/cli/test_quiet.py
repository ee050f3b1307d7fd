# SPDX-License-Identifier: Apache-2.0
"""What --quiet hides, and the progress bars: with a rate and the remaining time, on a terminal only."""

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from test_option_names import OPTIONS

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.cli import cli_errors
from transformers_fastvlm.cli.progress_bars import progress_bar, reading_bar
from transformers_fastvlm.data.scenes import SceneDataset

Run = Callable[..., Any]

BARS = {
    "convert": (("convert", "tiny", "out", "--to", "native"), "converting"),
    "export": (("export", "native", "tiny", "out"), "exporting"),
    "data check": (("data", "check", "train.json", "--image-folder", "classes"), "reading"),
    "batch": (("batch", "photos", "-o", "out.jsonl", "-p", "What?", "-m", "tiny", "--max-new-tokens", 4), "answering"),
    "bench": (
        ("bench", "tiny", "--image", "photos/a.png", "--repetitions", 1, "--warmup", 0, "--new-tokens", 4, "-o", "b"),
        "measuring",
    ),
}
"""Commands with a bar, and the bar's word; run in `place`."""
NOTES = {
    "new": ("new", "out", "--vision", "tiny", "--language-model", "tiny"),
    "train": (
        *("train", "finetune", "model.path=tiny", "data.source=train.json", "data.image_folder=classes"),
        *("output_dir=out", "arguments.max_steps=1", "train.global_batch_size=4", "arguments.use_cpu=true"),
    ),
}
"""Commands that print notes but have no bar of this package."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images in two classes, a folder `photos` and `train.json`."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for number, scene in enumerate(SceneDataset(length=4, seed=1)):
        file = Path("classes", "ab"[number % 2], f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        scene["images"][0].save(file)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A scene."}]
        rows.append({"image": str(file.relative_to("classes")), "conversations": turns})
    Path("train.json").write_text(json.dumps(rows))
    Path("photos").mkdir()
    shutil.copy(file, "photos/a.png")
    return tmp_path


def drawn(text: str) -> str:
    """Return what a terminal was sent, without its control codes."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def needs(verb: str) -> None:
    for package in {"train": ("accelerate",), "export": ("timm",)}.get(verb, ()):
        pytest.importorskip(package)


@pytest.mark.parametrize("verb", BARS)
def test_bars_have_a_rate_and_are_hidden_by_quiet(
    run: Run, place: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(verb)
    words, doing = BARS[verb]
    monkeypatch.setenv("FORCE_COLOR", "1")  # what Rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    loud = drawn(run(*words).stderr)
    assert re.search(rf"{doing} .*(-:--:--|0:00:\d\d)", loud), loud
    for left in ("out", "out.jsonl", "out.json", "b"):
        shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink(missing_ok=True)
    assert run(*words, "--quiet").stderr == ""


@pytest.mark.parametrize("verb", NOTES)
def test_quiet_hides_notes_but_no_result(run: Run, place: Path, verb: str) -> None:
    needs(verb)
    assert run(*NOTES[verb]).stderr != ""
    shutil.rmtree("out")
    shown = run(*NOTES[verb], "-q")
    assert (shown.stdout, shown.stderr) == ("out\n", "")


def test_quiet_keeps_warnings_and_errors(run: Run, fails: Callable[..., str], place: Path) -> None:
    pytest.importorskip("accelerate")
    shown = run("generate", "photos/a.png", "-p", "What?", "-m", "tiny", "--max-new-tokens", 1, "-q")
    assert shown.stdout.strip() and "the answer was cut after 1 tokens" in shown.stderr
    (place / "photos" / "b.png").write_bytes(b"not an image")
    words = ("batch", "photos", "-o", "out.jsonl", "-p", "What?", "-m", "tiny", "--max-new-tokens", 4, "-q")
    assert "1 row without an answer" in run(*words, code=1).stderr.splitlines()[0]
    assert "no such directory: 'gone'" in fails("convert", "gone", "out", "--to", "native", "--quiet")
    assert "projector" in run(*NOTES["train"], "--dry-run", "--quiet").stderr, "the plan is the result of a dry run"


def test_every_verb_with_notes_has_the_option() -> None:
    without = {verb for verb, _ in OPTIONS} - {verb for verb, option in OPTIONS if option.name == "quiet"}
    assert without == {"info", "env"}


def test_quiet_ends_with_its_verb() -> None:
    @cli_errors.reports_errors
    def verb(quiet: bool) -> None:
        assert cli_errors.is_quiet() == quiet
        raise ValueError("x")

    for quiet in (True, False):
        with pytest.raises(typer.Exit):
            verb(quiet=quiet)
        assert not cli_errors.is_quiet()


class Terminal(io.StringIO):
    """Takes text as a terminal of 120 columns does."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("unit", "steps", "shown"),
    [
        ("rows", 1000, r"12/1000 +\d[\d,.]* rows/(s|min) +\d+:\d\d:\d\d"),
        ("bytes", 10**9, r"12/1,000,000,000 bytes|0.0/1.0 GB +[\d.]+ \w+/s +\d+:\d\d:\d\d"),
    ],
)
def test_a_bar_shows_rate_and_remaining_time(
    unit: str, steps: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with progress_bar("reading", unit, terminal) as show:
        for done in range(13):
            show(done, steps)
            time.sleep(0.02)
    assert re.search(shown, drawn(terminal.getvalue())), drawn(terminal.getvalue())[-400:]


def test_there_is_no_bar_elsewhere() -> None:
    stream = io.StringIO()
    with progress_bar("reading", "rows", stream) as show:
        show(1, 2)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("words", [BARS["batch"][0], ("embed", "photos", "-o", "out.npy", "-m", "tiny")])
def test_reading_large_files_has_a_bar_that_quiet_hides(
    run: Run, place: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what Rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    words = tuple("big" if word == "tiny" else word for word in words)
    shutil.copytree(tiny_checkpoint(), "big")
    with open("big/notes.txt", "wb") as sparse:
        sparse.truncate(2**30)
    loud = drawn(run(*words).stderr)
    assert re.search(r"reading files .*(MB|GB).*(-:--:--|0:00:\d\d)", loud), loud
    assert run(*words, "--quiet", "--restart").stderr == ""


def test_a_bar_of_files_ends_with_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with reading_bar(stream=terminal) as reading:
        for _ in range(2):  # as for two data sets
            for done in (10**9, 2 * 10**9, 4 * 10**9):
                reading(done, 4 * 10**9)
                time.sleep(0.2)
        ended = terminal.getvalue()
        with progress_bar("training", "steps", terminal) as show:  # another bar may follow
            show(1, 2)
            show.reading(10**9, 4 * 10**9)
            time.sleep(0.2)
            show.reading(4 * 10**9, 4 * 10**9)
    assert re.search(r"reading files .*GB +[\d.]+ \w+/s +\d+:\d\d:\d\d", drawn(ended)), drawn(ended)
    both = drawn(terminal.getvalue().removeprefix(ended))
    assert "reading files" in both and "training" in both and both.rstrip().endswith("-:--:--")
    with reading_bar(shown=False, stream=(other := Terminal())) as reading:
        reading(1, 2)
    assert other.getvalue() == ""
