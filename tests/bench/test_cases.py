# SPDX-License-Identifier: Apache-2.0
"""The cases that options ask for, and options that cannot be used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.bench import Options
from transformers_fastvlm.bench.cases import cases


def test_each_combination_is_a_group_with_its_peers() -> None:
    options = Options(
        models=("0.5B", "7B"),
        sizes=(512, 1024),
        dtypes=("float32", "bfloat16"),
        against=("native", "llava-onevision-0.5b", "owner/other"),
        fuse=True,
    )
    found = cases(options)
    first = [case for case in found if case.group == 0]
    assert [(case.label, case.kind, case.resolution) for case in first] == [
        ("0.5B", "fastvlm", 512),
        ("0.5B fused", "fastvlm", 512),
        ("0.5B native", "native", 512),
    ]
    assert [case.reference for case in first] == [None, ("0.5B", 512), ("0.5B", 512)]
    assert [case.fuse for case in first] == [False, True, False]
    # Once for each dtype, beside the first model at its largest size.
    fixed = [case for case in found if case.kind in ("llava-onevision", "other")]
    assert [(case.kind, case.dtype, case.resolution, case.reference) for case in fixed] == [
        ("llava-onevision", "float32", 1152, ("0.5B", 1024)),
        ("other", "float32", None, ("0.5B", 1024)),
        ("llava-onevision", "bfloat16", 1152, ("0.5B", 1024)),
        ("other", "bfloat16", None, ("0.5B", 1024)),
    ]
    assert len({case.group for case in found}) == 8
    assert len({(case.label, case.resolution, case.dtype, case.batch) for case in found}) == len(found)


def test_each_model_has_its_own_size_by_default(checkpoint: Callable[[str], Path]) -> None:
    tiny = str(checkpoint("qwen2_tied"))
    found = cases(Options(models=(tiny, "0.5B"), against=("native", "llava-onevision-0.5b")))
    assert [(case.kind, case.resolution) for case in found] == [
        ("fastvlm", 256),
        ("native", 256),
        ("llava-onevision", 1152),
        ("fastvlm", 1024),
        ("native", 1024),
    ]


def test_another_model_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="has model_type 'qwen2'; expected a FastVLM"):
        cases(Options(models=(str(tmp_path),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "models is empty"),
        ({"models": ("0.5B", "0.5B")}, "models is 0.5B, 0.5B: a value occurs twice"),
        ({"models": ("3B",)}, "'3B' is neither a size"),
        ({"models": ("native",)}, "--against native"),
        ({"against": ("./gone",)}, "'./gone' is neither a size"),
        ({"sizes": (500,)}, "size is 500; expected a multiple of 64 from 256 to 2048"),
        ({"sizes": (4096,)}, "size is 4096"),
        ({"dtypes": ("int8",)}, "dtype is 'int8'; expected float32, bfloat16, float16"),
        ({"batches": (0,)}, "batch is 0; expected at least 1"),
        ({"new_tokens": 3}, "new_tokens is 3; expected at least 4"),
        ({"repetitions": 0}, "repetitions is 0; expected at least 1"),
        ({"image": "gone.jpg"}, "no image at 'gone.jpg'"),
        ({"image_backend": "cv2"}, "image backend is 'cv2'; expected pil, torchvision"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Options(**options)


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nor a directory with a config"):
        Options(models=(str(tmp_path),))
