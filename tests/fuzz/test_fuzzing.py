# SPDX-License-Identifier: Apache-2.0
"""Mutated files and requests: documented errors alone, no hang, bounded memory, nothing touched elsewhere."""

from typing import Any

import pytest

for name in ("av", "pyarrow", "fastapi"):
    pytest.importorskip(name, reason="needs the extras batch and serving: make test-serving")

from fuzzing import Job, jobs_of, report_of  # noqa: E402
from mutating import KINDS, drawn_image, image, image_seeds, request, rows, table, video  # noqa: E402

FOUND = ("exceptions", "hangs", "large", "touched")
FEW: list[Job] = [("image", 0, 800), ("rows", 0, 400), ("table", 0, 200), ("video", 0, 60), ("request", 0, 200)]


def assert_nothing_found(report: dict[str, Any]) -> None:
    assert {name: report[name][:20] for name in FOUND} == {name: [] for name in FOUND}


def test_some_mutated_inputs() -> None:
    report = report_of(FEW)
    assert_nothing_found(report)
    for kind, _, count in FEW:  # inputs that are all good, or all refused at the first byte, would show nothing
        outcomes = report["kinds"][kind]
        assert min(outcomes["read"], outcomes["refused"]) > count // 20, outcomes


@pytest.mark.soak
def test_ten_thousand_mutated_inputs() -> None:
    assert_nothing_found(report_of(jobs_of(10_000)))


def test_an_input_follows_from_its_number() -> None:
    for make in (image, rows, table, video, request):
        assert make(17) == make(17) != make(18)
    assert set(KINDS) == {"image", "rows", "table", "video", "request"}
    assert len(image_seeds()) > 25 and drawn_image().size == (48, 40)
