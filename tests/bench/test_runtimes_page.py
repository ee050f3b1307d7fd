# SPDX-License-Identifier: Apache-2.0
"""The table of runtimes: the page has the record's, and a row is what was measured."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIRST = {"median": 1.416, "q1": 1.4, "q3": 1.5, "min": 1.4, "max": 1.5, "runs": 3}


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """benchmarks/runtimes.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("runtimes")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("runtimes", "_results"):
        sys.modules.pop(name, None)


def test_the_page_has_the_records_table(script: Any) -> None:
    record = json.loads(script.RECORD.read_text(encoding="utf-8")) if script.RECORD.exists() else None
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.count(script.BEGIN) == page.count(script.END) == 1
    assert script.page_with(page, record) == page, "run `python benchmarks/runtimes.py --page`"


def record_of(**parts: Any) -> dict[str, Any]:
    return {"machine": {"cpu": "a processor"}, **parts}


def test_a_row_has_what_was_measured_and_no_more(script: Any) -> None:
    q8 = {"runtime": "onnx", "precision": "q8", "bytes_on_disk": 654_000_000}
    answered = {**q8, "right_percent": 98.6, "same_answers": 5, "same_captions": 39}
    timed = {**q8, "first_token_seconds": FIRST, "tokens_per_second": None, "peak_bytes": 3 * 2**29}
    accuracy = {"scenes": 500, "captions": 40, "results": [answered]}
    speed = {"model": "0.5b", "pixels": 1024, "threads": 2, "rounds": 3, "results": [timed]}
    (whole,) = [line for line in script.table(record_of(accuracy=accuracy, speed=speed)).splitlines() if "q8" in line]
    assert whole == "| onnx | q8 | 98.6 % | 39 | 1.42 s | 1.5 GiB | 0.65 GB |"
    alone = script.table(record_of(accuracy=accuracy))
    assert "| onnx | q8 | 98.6 % | 39 |\n" in alone and "rounds" not in alone
    page = script.page_with(script.PAGE.read_text(encoding="utf-8"), record_of(speed=speed))
    assert script.page_with(page, None) == script.page_with(script.PAGE.read_text(encoding="utf-8"), None)
    assert "0.5B shape with random weights, an image of 1024 px, a processor, 2 threads" in page


def test_rows_of_a_larger_model(script: Any) -> None:
    assert set(script.names()) - set(script.names("0.5b")) == {"onnx:float32"}
    assert set(script.names("0.5b")) >= {"transformers:bfloat16", "native:float32", "llamacpp:q8_0"}
