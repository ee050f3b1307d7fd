# SPDX-License-Identifier: Apache-2.0
"""The program on the page about adapters runs; tests/test_readme.py runs those of pages that need no peft."""

from collections.abc import Callable
from pathlib import Path

import pytest

from test_readme import HUB_NAME, MARK, ROOT, blocks

pytest.importorskip("peft", reason="adapters need peft")

PAGE = ROOT / "docs" / "training-scale.md"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_page_runs(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8").replace("<!-- test with peft -->", MARK)
    marked = [block for block in blocks(text) if block.marked]
    assert len(marked) == 4 and text.count("```python") == 6
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in marked:
        code = block.code.replace(HUB_NAME, checkpoint("qwen2_tied").as_posix())
        exec(compile("\n" * (block.line - 1) + code, PAGE.name, "exec"), namespace)
    assert (tmp_path / "my-model" / "config.json").is_file()
