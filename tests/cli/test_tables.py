# SPDX-License-Identifier: Apache-2.0
"""Tables: whole where they fit, and never with letters cut off."""

import sys

import pytest

from transformers_fastvlm.cli.text_tables import print_table

COLUMNS = ("model", "px", "dtype", "tokens", "first token", "tokens/s")
ROWS = [
    ("0.5B", "1024", "bfloat16", "276", "1234 (1200-1300)", "12.5"),
    ("0.5B fused", "512", "float32", "84", "9.5", "1"),
]


@pytest.mark.parametrize("width", [20, 40, 70, 71, 72, 120, 150])
def test_no_letter_is_lost(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    print_table("milliseconds", COLUMNS, ROWS)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert [cell for cell in (*COLUMNS, *ROWS[0], *ROWS[1]) if cell not in printed] == []
    is_table = len(printed.splitlines()) < len(COLUMNS) * len(ROWS)
    assert is_table == (width >= 71)
    assert max(map(len, printed.splitlines())) <= max(width, 32)


def test_a_file_gets_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table("milliseconds", COLUMNS, ROWS)
    printed = capsys.readouterr().out.rstrip().splitlines()
    assert printed[0].strip() == "milliseconds" and printed[-1].split()[-1] == "1"
    assert [line.split()[0] for line in printed[-2:]] == ["0.5B", "0.5B"]
