# SPDX-License-Identifier: Apache-2.0
"""Set-up of the run: our classes' names, tiny models for the pipelines, and no skip without a written reason."""

import os
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
_ROW = re.compile(r"^\| `(?P<test>[^`]+)` \| `(?P<reason>[^`]+)` \| (?P<why>.+) \|$")


def explained_skips() -> list[tuple[str, str]]:
    """Return the (test, reason) patterns of skips.md."""
    rows = [_ROW.match(line) for line in (ROOT / "skips.md").read_text(encoding="utf-8").splitlines()]
    return [(row["test"], row["reason"]) for row in rows if row]


EXPLAINED = explained_skips()


def pytest_configure(config: pytest.Config) -> None:
    import transformers.processing_utils  # noqa: F401  (importing it replaces sys.modules["transformers"])
    from transformers.utils.logging import disable_progress_bar

    import transformers_fastvlm

    disable_progress_bar()
    # Upstream's pipeline tests look classes up by name in `transformers`.
    for name in transformers_fastvlm.__all__:
        if name.startswith("FastV") and not hasattr(sys.modules["transformers"], name):
            setattr(sys.modules["transformers"], name, getattr(transformers_fastvlm, name))
    if not hasattr(config, "workerinput"):
        from tests.models.fastvlm.tiny import save_tiny_models

        save_tiny_models(Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Turn a skip that no row of skips.md explains into a failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ").replace("\n", " ")
    test = "::".join(report.nodeid.split("::")[1:])
    if not any(fnmatchcase(test, name) and fnmatchcase(reason, why) for name, why in EXPLAINED):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped ({reason!r}), and no row of skips.md says why that is right."
