# SPDX-License-Identifier: Apache-2.0
"""What is said when a process or a device fails, and what measurements amount to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_fastvlm.bench import Options, run
from transformers_fastvlm.bench.bench_run import check_device
from transformers_fastvlm.bench.measuring import Times, in_turns, ratio, spread, surroundings, write_record


def test_a_failure_in_a_process_is_raised_here(
    checkpoint: Callable[[str], Path], picture: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(checkpoint("qwen2_tied"), tmp_path / "broken"))
    next(broken.glob("*.safetensors")).write_bytes(b"not safetensors")
    options = Options(models=(str(broken),), sizes=(256,), threads=1, image=str(picture))
    with pytest.raises(OSError, match=r"broken 256 px float32 batch 1: .*cannot be read"):
        run(options)


def test_a_device_that_is_not_there_is_named() -> None:
    for name in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"device is '{name}', which is not available .*expected cpu"):
            check_device(name)


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0]) == {"median": 2.5, "q1": 1.75, "q3": 3.5, "min": 1.0, "max": 5.0, "runs": 4}
    assert spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "max": 2.0, "runs": 1}


def test_work_runs_in_turns_and_warm_up_does_not_count() -> None:
    ran: list[object] = []
    work = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = in_turns(work, 2, warmup=1, before=lambda name, turn: ran.append((name, turn)))
    assert [name for name in ran if isinstance(name, str)] == [*"abc", *"bca", *"cab"]
    assert ran[:2] == [("a", 0), "a"] and ran[6:8] == [("b", 1), "b"]
    assert all(len(own.wall) == len(own.cpu) == 2 for own in times.values())
    ran.clear()
    in_turns(work, 2, warmup=0, rotate=False)
    assert ran == [*"abc", *"abc"]


def test_rates_and_ratios() -> None:
    times = Times([2.0, 4.0, 9.0], [1.0, 1.0, 1.0])
    assert times.rates(8, "answers") == {"answers_per_second": 2.0, "answers_per_processor_second": 8.0}
    assert times.spread()["seconds"] == spread([2.0, 4.0, 9.0])
    assert ratio(2.0, 3.0) == 0.6667


def test_a_record_says_where_it_was_measured(tmp_path: Path) -> None:
    record = {"x": 1, **surroundings(packages=["pytest", "no-such-package"])}
    text = write_record(record, tmp_path / "record.json")
    assert json.loads(text) == json.loads((tmp_path / "record.json").read_text()) == record
    assert {"torch", "transformers_fastvlm", "pytest"} <= record["versions"].keys() >= {"python"}
    assert "no-such-package" not in record["versions"] and record["machine"]["cpu"]
