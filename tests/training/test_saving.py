# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole or not there, and a run that was killed ends as if it had not been."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.training import Recipe, run
from transformers_fastvlm.training.trainer import last_checkpoint, rotate_checkpoints

pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytest.importorskip("resource", reason="limits on the size of files are POSIX's")
import resource

from resumable import run_until
from transformers.trainer_utils import get_last_checkpoint

MakeRecipe = Callable[..., Recipe]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def run_and_kill(recipe: Recipe, when: str) -> None:
    """Run in a process that is killed, and make sure that it was.

    A process that was forked has everything imported; with a GPU, PyTorch does not train in one.
    """
    method = "fork" if sys.platform == "linux" and not torch.accelerator.is_available() else "spawn"
    process = multiprocessing.get_context(method).Process(target=run_until, args=(recipe.to_yaml(), when))
    process.start()
    process.join(timeout=300)
    process.kill()
    assert process.exitcode == -9


@pytest.fixture
def long_recipe(recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """An epoch of three updates, two batches each, and two more; a checkpoint at every other, and dropped paths."""

    def make(out: Path) -> Recipe:
        return recipe(
            output_dir=str(out),
            model={"drop_path_rate": 0.3, "image_size": 64},
            data={"group": True, "options": {"limit": 6}},
            train={"global_batch_size": 2},
            arguments={"per_device_train_batch_size": 1, "max_steps": 5, "save_steps": 2, "save_total_limit": 2},
        )

    return make


@pytest.fixture(scope="module")
def whole_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(long_recipe: MakeRecipe, whole_directory: Path) -> Path:
    """The result of a run that nothing interrupted, made once."""
    if not whole_directory.exists():
        run(long_recipe(whole_directory))
    return whole_directory


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 and newer
def test_killed_while_saving_and_resumed_ends_as_if_not(long_recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    run_and_kill(long_recipe(out), "save 2")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2"}
    assert not (out / "config.json").exists()  # nothing that looks finished
    assert (out / ".incomplete" / "checkpoint-4" / "model.safetensors").exists()
    assert get_last_checkpoint(str(out)) == str(last_checkpoint(out)) == str(out / "checkpoint-2")
    run(long_recipe(out), resume=True)
    assert_same_weights(out, whole)
    assert not (out / ".incomplete").exists()
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    logged = [json.loads((run / "checkpoint-5" / "trainer_state.json").read_text()) for run in (out, whole)]
    losses = [{entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry} for state in logged]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 and newer
@pytest.mark.parametrize("moment", ["1", "2", "3", "4", "5", "save 1", "save 2", "save 3"])
def test_killed_anywhere_and_resumed_ends_as_if_not(
    moment: str, long_recipe: MakeRecipe, whole: Path, tmp_path: Path
) -> None:
    run_and_kill(long_recipe(tmp_path / "killed"), moment)
    run(long_recipe(tmp_path / "killed"), resume=True)
    assert_same_weights(tmp_path / "killed", whole)


def test_disk_full_while_saving_leaves_the_checkpoint_before(
    long_recipe: MakeRecipe, whole: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: the second checkpoint does not fit."""
    out = tmp_path / "out"
    made = long_recipe(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(line: str) -> None:
        if line.startswith("step 3/"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(OSError, match=r"The checkpoint of step 4 could not be written.*checkpoint-2 is complete"):
            run(made, report=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "recipe.yaml", "rows.json"]
    FastVLMForConditionalGeneration.from_pretrained(out / "checkpoint-2")
    FastVLMProcessor.from_pretrained(out / "checkpoint-2")
    run(made, resume=True)
    assert_same_weights(out, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system in memory; the function that is returned sets its size, in MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    words = ["-t", "tmpfs", "-o", "size=1m", "fastvlm-small-disk", str(disk)]
    if mount is None or subprocess.run([mount, *words], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")

    def resize(size: int) -> Path:
        subprocess.run([mount, "-o", f"remount,size={size}m", str(disk)], check=True)
        return disk

    yield resize
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.soak
def test_a_disk_that_is_really_full(recipe: MakeRecipe, small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    """One checkpoint of 7 MiB fits, and a part of the next."""
    out = small_disk(10) / "out"
    made = recipe(output_dir=str(out), model={"image_size": 64})
    with pytest.raises(OSError, match=r"The checkpoint of step 4 could not be written.*checkpoint-2 is complete"):
        run(made)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "recipe.yaml", "rows.json"]
    small_disk(64)
    run(made, resume=True)
    run(recipe(output_dir=str(tmp_path / "whole"), model={"image_size": 64}))
    assert_same_weights(out, tmp_path / "whole")


def test_disk_full_at_the_end_leaves_nothing_that_looks_finished(recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = recipe(model={"image_size": 64}, arguments={"max_steps": 1, "save_strategy": "no"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(line: str) -> None:
        if line.startswith("step 1/"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(OSError, match=r"The finished model could not be written.*no checkpoint to resume"):
            run(made, report=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in out.iterdir()) == ["recipe.yaml", "rows.json"]


def test_a_checkpoint_that_a_plain_trainer_left_half_written_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "checkpoint-2") is None


def test_checkpoints_load_with_the_auto_classes(recipe: MakeRecipe, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    run(recipe(model={"image_size": 64}, arguments={"max_steps": 2}))
    for directory in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        model: Any = AutoModelForImageTextToText.from_pretrained(directory)
        processor = AutoProcessor.from_pretrained(directory)
        assert model.config.image_token_id == processor.image_token_id
    stored = weights(tmp_path / "out" / "checkpoint-2")
    assert "model.mm_projector.0.weight" in stored  # Apple's names


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (1, None, {3, 7}),
        (2, None, {2, 3, 7}),
        (1, 1, {1, 3, 7}),
        (2, 1, {1, 3, 7}),
        (None, None, {1, 2, 3, 7}),
        (9, None, {1, 2, 3, 7}),
    ],
)
def test_rotation_goes_by_step(limit: int | None, best: int | None, left: set[int], tmp_path: Path) -> None:
    """Whatever the clock says: the first checkpoint is an hour ahead. A later one is of a run that went another way."""
    now = os.stat(tmp_path).st_mtime
    for step in (1, 2, 3, 7):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        os.utime(tmp_path / f"checkpoint-{step}", (now - 3600 * step, now - 3600 * step))
    (tmp_path / "checkpoint-0").mkdir()  # the user's own
    (tmp_path / "checkpoint-0" / "notes.txt").touch()
    rotate_checkpoints(tmp_path, 3, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert {int(path.name.removeprefix("checkpoint-")) for path in tmp_path.iterdir()} == {0, *left}


def test_other_rows_are_named_when_a_run_is_resumed(recipe: MakeRecipe, rows_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    rows = json.loads(rows_file.read_text())
    file.write_text(json.dumps(rows))
    made = recipe(
        model={"image_size": 64}, data={"source": str(file)}, arguments={"max_steps": 1, "save_strategy": "no"}
    )
    read: list[tuple[int, int]] = []
    run(made, dry_run=True, reading=lambda *bytes_of: read.append(bytes_of))
    assert read == [], "a dry run compares nothing"
    run(made, reading=lambda *bytes_of: read.append(bytes_of))
    assert read[-1] == (file.stat().st_size,) * 2
    (tmp_path / "out" / "config.json").unlink()  # as if it were not finished

    def told() -> list[str]:
        lines: list[str] = []
        run(made, resume=True, dry_run=True, report=lines.append)
        return [line for line in lines if line.startswith("changed since the run started")]

    assert told() == []
    rows[0]["conversations"][1]["value"] += "!"
    file.write_text(json.dumps(rows))
    assert [line.partition(";")[0] for line in told()] == ["changed since the run started: data.source had other rows"]
    file.write_text(json.dumps(rows[:-1]))
    assert "data.source had 12 rows, has 11" in told()[0]
