# SPDX-License-Identifier: Apache-2.0
"""What is said when a process or a device fails, and what measurements amount to."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from transformers_fastvlm.bench import Options, run
from transformers_fastvlm.bench.bench_run import check_device
from transformers_fastvlm.bench.measuring import spread


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
