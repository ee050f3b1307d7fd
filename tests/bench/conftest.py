# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the benchmark's tests: a picture, and a case measured in this process."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.bench.cases import Case, Options, cases
from transformers_fastvlm.bench.photo import make_photo
from transformers_fastvlm.bench.worker import Runner

Measure = Callable[..., tuple[dict[str, Any], dict[str, Any], Runner]]


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small photo, square as the drawn one of a real run."""
    path = tmp_path_factory.mktemp("pictures") / "photo.jpg"
    make_photo(300, 300).save(path, quality=90)
    return path


@pytest.fixture
def measure(picture: Path) -> Measure:
    """Build the case of `options` that is of `kind` and run it once; returns its facts, the run, and the runner."""

    def call(options: Options, kind: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any], Runner]:
        case: Case = next(case for case in cases(options) if case.kind == kind)
        case = replace(case, **changes)
        runner = Runner({"case": asdict(case), "options": options.as_dict(), "image": str(picture)})
        return runner.facts, runner.run(), runner

    return call
