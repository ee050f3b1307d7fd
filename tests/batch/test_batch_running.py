# SPDX-License-Identifier: Apache-2.0
"""Runs of `fastvlm batch` with a tiny model: its answers, errors that stop nothing, going on, kills at any moment."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.batch import COLUMNS, BatchOptions, Interrupted, JournalError, Report, run_batch
from transformers_fastvlm.engines import Conversation, Request, Sampling, TransformersEngine

PROMPT = "What is it?"
SHORT = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    return str(checkpoint("qwen2_untied"))


@pytest.fixture(scope="module")
def loaded(model) -> TransformersEngine:
    return TransformersEngine(model, dtype="float32", device="cpu")


class Watched:
    """The engine, which counts what it is asked."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.batch_size = engine, engine.batch_size
        self.asked = self.closed = 0

    def stream(self, conversation: Conversation, sampling: Sampling) -> Request:
        self.asked += 1
        return self.engine.stream(conversation, sampling)

    def check(self, sampling: Sampling) -> None:
        self.engine.check(sampling)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def engine(loaded) -> Watched:
    return Watched(loaded)


@pytest.fixture
def run(engine, model, tmp_path):
    """Run over `tmp_path`/photos into `tmp_path`/out.jsonl, unless told otherwise."""

    def call(*inputs: str | Path, output: str = "out.jsonl", about: Any = None, **options: Any) -> Report:
        more = {key: options.pop(key) for key in ("restart", "progress", "subtitles") if key in options}
        chosen = BatchOptions(**{"prompt": PROMPT, "sampling": SHORT, "batch_size": 3} | options)
        names = [str(name) for name in inputs] or [str(tmp_path / "photos")]
        return run_batch(names, tmp_path / output, lambda: engine, chosen, about=about or {"model": model}, **more)

    return call


def stop(done: int, total: int | None) -> None:
    """Interrupt a run, as its progress, after the first batch."""
    if done:
        raise KeyboardInterrupt


@pytest.fixture
def photos(tmp_path) -> Path:
    return draw(tmp_path / "photos", 8)


def draw(folder: Path, number: int) -> Path:
    folder.mkdir()
    for index in range(number):
        image = Image.new("RGB", (40 + index, 30), (index * 29 % 256, 90, 200))
        image.paste((250, 20, index * 31 % 256), (0, 0, 5 + 2 * index, 20))
        image.save(folder / f"{index:02}.png")
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(tuple(row) == COLUMNS for row in rows)
    return rows


def test_answers(run, engine, loaded, photos, tmp_path) -> None:
    steps: list[tuple[int, int | None]] = []
    report = run(system="Be brief.", progress=lambda done, total: steps.append((done, total)))
    assert (report.rows, report.errors, report.resumed_rows) == (8, 0, 0)
    assert steps == [(0, 8), (3, 8), (6, 8), (8, 8)] and engine.asked == 8 and engine.closed == 1
    rows = rows_of(tmp_path / "out.jsonl")
    files = sorted(photos.iterdir())
    assert [row["source"] for row in rows] == [str(file) for file in files]
    for row, file in zip(rows, files, strict=True):
        with Image.open(file) as image:
            content = [{"type": "image", "image": image.copy()}, {"type": "text", "text": PROMPT}]
        conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        answer = loaded.generate([conversation], SHORT)[0]
        assert (row["answer"], row["finish_reason"]) == (answer.text, answer.finish_reason)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (answer.prompt_tokens, answer.completion_tokens)
        assert row["question"] == PROMPT and {row[name] for name in ("row", "image", "time", "error")} == {None}
    assert report.cut == sum(row["finish_reason"] == "length" for row in rows)
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_tables_come_out_in_their_order(run, engine, photos, tmp_path) -> None:
    rows = [{"image": f"{n % 8:02}.png", "q": "Which? " * (n * 7 % 5 + 1)} for n in range(10)]
    (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(photos / "rows.jsonl", prompt="{q}Say it.")
    found = rows_of(tmp_path / "out.jsonl")
    assert [(row["row"], row["image"], row["question"]) for row in found] == [
        (index, row["image"], row["q"] + "Say it.") for index, row in enumerate(rows)
    ]
    assert all(row["answer"] is not None for row in found) and engine.asked == 10


def test_a_long_answer_holds_up_no_other_row(run, engine, photos, tmp_path) -> None:
    eight = ["Which one is the longest question?", *["Which?"] * 7]
    (photos / "rows.jsonl").write_text("".join(f'{{"image": "{n:02}.png", "q": "{q}"}}\n' for n, q in enumerate(eight)))
    plain, asked = engine.stream, []

    def stream(conversation: Conversation, sampling: Sampling) -> Request:
        asked.append(plain(conversation, sampling if asked else dataclasses.replace(sampling, max_new_tokens=1000)))
        return asked[-1]

    def progress(done: int, total: int | None) -> None:
        if done == 6:
            assert not asked[0].done, "the first row is in neither of the first two batches of three"
            raise KeyboardInterrupt

    run(photos / "rows.jsonl", prompt="{q}", output="whole.jsonl")
    config = engine.engine.model.generation_config
    ends, engine.stream = config.eos_token_id, stream
    config.eos_token_id = None  # so that only the length ends an answer
    try:
        with pytest.raises(Interrupted, match="stopped after 6 rows"):
            run(photos / "rows.jsonl", prompt="{q}", progress=progress)
    finally:
        config.eos_token_id, engine.stream, engine.asked = ends, plain, 0
    assert (run(photos / "rows.jsonl", prompt="{q}").resumed_rows, engine.asked) == (6, 2)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_errors_stop_nothing(run, engine, photos, tmp_path) -> None:
    (photos / "01.png").write_text("no picture")
    (photos / "03.png").write_bytes((photos / "03.png").read_bytes()[:50])
    Image.new("F", (8, 8), 7.0).save(photos / "05.tiff")
    rows = [
        {"image": f"{n:02}.png", "q": q} for n, q in enumerate(["x", "x", "long " * 3000, "x", "<image> <image>", "x"])
    ]
    rows.append({"image": "05.tiff", "q": "x"})
    rows.append({"image": "../out.jsonl", "q": "x"})
    (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(photos / "rows.jsonl", photos)
    assert (report.rows, report.errors, report.left_out) == (8 + 9, 4 + 3, {".jsonl": 1})
    report = run(photos / "rows.jsonl", prompt="Now {q}?", output="filled.jsonl")
    errors = [row["error"] for row in rows_of(tmp_path / "filled.jsonl")]
    messages = [
        None,
        "not an image",
        "fills the model's context",
        "truncated",
        "2 <image>",
        None,
        "values from",
        "leaves",
    ]
    for message, error in zip(messages, errors, strict=True):
        assert (error is None) if message is None else message in error, (message, error)
    assert report.errors == 6
    assert [place for place, _ in report.examples] == [f"{photos / 'rows.jsonl'}, row {n}" for n in (1, 2, 3, 4, 6, 7)]
    assert all((row["answer"] is None) == (row["error"] is not None) for row in rows_of(tmp_path / "filled.jsonl"))


def test_all_unreadable(run, engine, photos, tmp_path) -> None:
    for file in photos.iterdir():
        file.write_bytes(b"")
    report = run()
    assert (report.rows, report.errors, engine.asked) == (8, 8, 0)


def test_goes_on_after_an_interruption(run, engine, photos, tmp_path) -> None:
    run(output="whole.jsonl")
    with pytest.raises(Interrupted, match="stopped after 3 rows") as error:
        run(progress=stop)
    assert error.value.rows == 3 and not (tmp_path / "out.jsonl").exists()
    engine.asked = 0
    assert run().resumed_rows == 3
    assert engine.asked == 5
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_run_is_refused_and_named(run, engine, photos, tmp_path, copy_of_model) -> None:
    def stopped(**options: Any) -> None:
        with pytest.raises(Interrupted):
            run(progress=stop, **options)

    about = {"model": str(copy_of_model), "dtype": "float32"}
    stopped(about=about)
    for change, message in (
        ({"prompt": "Who?"}, "prompt 'What is it\\?', not 'Who\\?'"),
        ({"batch_size": 2}, "batch_size 3, not 2"),
        ({"sampling": Sampling(max_new_tokens=5)}, "max_new_tokens 4, not 5"),
        ({"about": about | {"dtype": "bfloat16"}}, "dtype 'float32', not 'bfloat16'"),
        ({"do_exif_transpose": False}, "do_exif_transpose True, not False"),
    ):
        with pytest.raises(JournalError, match=message):
            run(**{"about": about} | change)
    weights = copy_of_model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(JournalError, match="different model files"):
        run(about=about)
    weights.write_bytes(content)
    (photos / "08.png").write_bytes((photos / "07.png").read_bytes())
    with pytest.raises(JournalError, match=r"8 files or rows of .*photos, which now has 9"):
        run(about=about)
    engine.asked = 0
    assert run(about=about, restart=True).rows == 9
    assert engine.asked == 9


@pytest.fixture
def copy_of_model(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_does_not_overwrite(run, engine, photos, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(
        FileExistsError,
        match=r"exists already, .*new images, use another output.*again, use --restart",
    ):
        run()
    assert out.read_text() == "mine" and engine.asked == 0
    assert run(restart=True).rows == 8
    assert len(rows_of(out)) == 8


def test_sampling_differs_between_rows_and_comes_again_in_any_batch(run, photos, tmp_path) -> None:
    for file in photos.iterdir():
        file.write_bytes((photos / "00.png").read_bytes())
    sampling = Sampling(max_new_tokens=6, temperature=2.0, seed=3)
    for output, batch_size in (("one.jsonl", 1), ("two.jsonl", 1), ("three.jsonl", 3)):
        run(output=output, sampling=sampling, batch_size=batch_size)
    written = {(tmp_path / output).read_bytes() for output in ("one.jsonl", "two.jsonl", "three.jsonl")}
    assert len(written) == 1
    assert len({row["answer"] for row in rows_of(tmp_path / "one.jsonl")}) > 1


def test_subtitles_need_videos(run, photos) -> None:
    with pytest.raises(ValueError, match="is a subtitle file, which needs one video as the only input"):
        run(output="out.srt")
    with pytest.raises(ValueError, match="the inputs have no video"):
        run(subtitles="captions")


def kills(model: str, folder: Path, moments: int) -> dict[str, Any]:
    """Kill runs over 10 images, one of them damaged; see batch_kills.py."""
    photos = draw(folder / "photos", 10)
    (photos / "04.png").write_text("no picture")
    script = Path(__file__).parent / "batch_kills.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), model, str(photos), str(moments), "7"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork and no SIGKILL")
def test_killed_at_any_moment(model, tmp_path) -> None:
    found = kills(model, tmp_path, 2)
    assert found["different"] == [] and found["rows"] == 10
    assert found["steps"] == 17  # whether a random moment lies before the end is a matter of the machine's load


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork and no SIGKILL")
def test_killed_at_many_moments(model, tmp_path) -> None:
    found = kills(model, tmp_path, 20)
    assert found["different"] == [] and found["killed"] >= 10


# Outputs


def test_an_output_that_is_an_input_is_refused(run, engine, photos, tmp_path) -> None:
    table = photos / "t.jsonl"
    table.write_text('{"image": "00.png", "gold": 1}\n')
    before = table.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(table)
    os.link(table, tmp_path / "hard.jsonl")
    for output in ("photos/t.jsonl", "photos/../photos/t.jsonl", "link.jsonl", "hard.jsonl"):
        for restart in (False, True):
            with pytest.raises(ValueError, match=r"the output .* is the input"):
                run(table, output=output, restart=restart)
    for name in ("new.jsonl.partial", "new.jsonl.journal"):
        shutil.copy(photos / "00.png", tmp_path / name)
        with pytest.raises(ValueError, match=r"the output .* is the input"):
            run(tmp_path / name, output="new.jsonl", restart=True)
        (tmp_path / name).unlink()
    assert table.read_bytes() == before and engine.asked == 0
    assert not list(tmp_path.glob("**/*.journal"))


@pytest.mark.parametrize("already", [False, True])
def test_an_output_that_appears_is_not_replaced(run, engine, photos, tmp_path, already: bool) -> None:
    out = tmp_path / "out.jsonl"
    if already:
        out.write_text("to be replaced")

    def appear(done: int, total: int | None) -> None:
        if done == 8:
            out.write_text("mine")

    with pytest.raises(FileExistsError, match="appeared, or was changed, since the run began"):
        run(progress=appear, restart=already)
    assert out.read_text() == "mine" and not (tmp_path / "out.jsonl.partial").exists()
    with pytest.raises(FileExistsError, match="finished work is saved"):
        run()
    assert out.read_text() == "mine"
    out.unlink()
    assert (run().resumed_rows, engine.asked) == (8, 8)
    assert len(rows_of(out)) == 8


def test_killed_after_publishing_ends_as_if_not(run, engine, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers_fastvlm.batch.batch_journal.BatchJournal.remove", lambda self: None)
    run()
    written = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.undo()
    assert run().resumed_rows == 8
    assert (tmp_path / "out.jsonl").read_bytes() == written and not (tmp_path / "out.jsonl.journal").exists()


def test_what_restart_may_replace_is_kept_over_a_stop(run, engine, photos, tmp_path) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(Interrupted):
        run(progress=stop, restart=True)
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert run().resumed_rows == 3 and len(rows_of(tmp_path / "out.jsonl")) == 8


def test_a_journal_without_a_batch_allows_nothing(run, engine, photos, tmp_path) -> None:
    """Of a run with --restart that was killed while the model was loaded."""
    (tmp_path / "out.jsonl").write_text("mine")
    (tmp_path / "out.jsonl.journal").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        run()
    assert (tmp_path / "out.jsonl").read_text() == "mine" and engine.asked == 0


def test_a_link_is_written_through(run, engine, photos, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.jsonl"
    link.symlink_to(tmp_path / "disk" / "real.jsonl")
    with pytest.raises(Interrupted) as stopped:
        run(progress=stop)
    assert stopped.value.journal == tmp_path / "disk" / "real.jsonl.journal"
    assert run(output="disk/real.jsonl").resumed_rows == 3  # one run, by either name
    (tmp_path / "disk" / "real.jsonl").unlink()
    run()
    assert link.is_symlink() and len(rows_of(tmp_path / "disk" / "real.jsonl")) == 8


# Images that change


@pytest.mark.parametrize("kind", ["a folder", "a table"])
@pytest.mark.parametrize("change", ["bytes", "time", "gone", "none"])
def test_images_that_changed_are_noticed(run, engine, photos, tmp_path, kind: str, change: str) -> None:
    source = photos
    if kind == "a table":
        source = photos / "rows.jsonl"
        source.write_text("".join(f'{{"image": "{number:02}.png"}}\n' for number in range(8)))

    def stop(done: int, total: int | None) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(source, progress=stop)
    asked, later = photos / "01.png", photos / "07.png"
    for file in (asked,) if change != "none" else (later,):
        size = file.stat().st_size
        if change == "gone":
            file.unlink()
        elif change == "time":
            os.utime(file, (1, 1))
        else:
            file.write_bytes(bytes(size))
    if change == "none":
        assert run(source).resumed_rows == 6
    else:
        with pytest.raises(
            ValueError, match=r"01.png' has changed since|01.png has changed|other content|files or rows"
        ):
            run(source)
        assert (tmp_path / "out.jsonl.journal").exists()


def test_images_that_move_are_counted_over_a_resumed_run(run, engine, photos, tmp_path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    clear = [Image.new("RGBA", (8, 8), (value, 0, 0, 9)) for value in (9, 99)]
    folder = tmp_path / "moving"
    folder.mkdir()
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    clear[0].save(folder / "b.png", save_all=True, append_images=clear[1:])
    frames[0].save(folder / "c.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "d.tif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "e.gif")
    frames[0].save(folder / "f.tif")
    report = run(folder)
    assert (report.rows, report.errors, report.first_only) == (6, 0, 4)
    assert all("first_of_several" not in row for row in rows_of(report.output))
