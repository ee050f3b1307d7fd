# SPDX-License-Identifier: Apache-2.0
"""Parquet in and out of `fastvlm batch`."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, of the extra batch")
pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow, of the extra batch")

from transformers_fastvlm.batch import COLUMNS, SourceOptions  # noqa: E402
from transformers_fastvlm.batch.outputs import state_of, write_rows  # noqa: E402
from transformers_fastvlm.batch.sources import find_sources  # noqa: E402


def png(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 9)).save(file, "PNG")
    return file.getvalue()


def requests_of(path: Path, **options: Any) -> list[Any]:
    return list(find_sources([str(path)], SourceOptions(**{"prompt": "{q}"} | options)))


def widths(requests: list[Any]) -> list[Any]:
    found: list[Any] = []
    for request in requests:
        try:
            found.append(request.error or request.open_image().width)
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """200 rows: paths, files' bytes, and Hugging Face's structure, each in a column."""
    (tmp_path / "a.png").write_bytes(png(21))
    rows = {
        "q": [f"question {n}" for n in range(200)],
        "path": ["a.png"] * 198 + ["../b.png", None],
        "content": [png(10 + n % 3) for n in range(199)] + [b"no picture"],
        "both": [{"bytes": png(30), "path": "x.png"}] * 198 + [{"bytes": None, "path": "a.png"}, None],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet", row_group_size=30)
    return tmp_path / "rows.parquet"


def test_columns_of_images(table: Path) -> None:
    paths = requests_of(table, image_column="path")
    assert [request.row for request in paths] == list(range(200)) and paths[7].question == "question 7"
    found = widths(paths)
    assert found[:198] == [21] * 198 and "leaves the image folder" in found[198] and "'path' is empty" in found[199]
    found = widths(requests_of(table, image_column="content"))
    assert found[:199] == [10 + n % 3 for n in range(199)] and "not an image" in found[199]
    both = requests_of(table, image_column="both")
    assert widths(both)[:199] == [30] * 198 + [21] and both[0].image == "x.png"
    source = find_sources([str(table)], SourceOptions(prompt="{q}", image_column="path"))
    assert source.rows() == 200


def test_damaged_in_the_middle(table: Path) -> None:
    rows = {"q": ["x"] * 200, "content": [random.Random(n).randbytes(500) for n in range(200)]}
    pq.write_table(pa.table(rows), table, row_group_size=30, compression="none")
    content = bytearray(table.read_bytes())
    content[50_000:70_000] = bytes(20_000)
    table.write_bytes(content)
    requests = requests_of(table, image_column="content")
    assert len(requests) == 200
    assert requests[0].error is None and "cannot be read from row" in requests[-1].error


def test_refuses_tables(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'image'; it has 'q', 'path', 'content', 'both'"):
        requests_of(table)
    table.write_bytes(table.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a Parquet file, or it is damaged"):
        requests_of(table)


def test_writes(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    empty = dict.fromkeys(COLUMNS)
    rows = [empty | {"source": "a", "error": "no"}, empty | {"source": "naïve", "row": 3, "time": 2.5, "answer": "x"}]
    write_rows(out, iter(rows))
    written = pq.read_table(out)
    assert written.to_pylist() == rows
    assert {field.name: str(field.type) for field in written.schema if field.type != pa.string()} == {
        "row": "int64",
        "time": "double",
        "prompt_tokens": "int64",
        "completion_tokens": "int64",
    }
    write_rows(out, (empty | {"source": str(n)} for n in range(20_000)), state_of(out))
    assert pq.read_table(out)["source"].to_pylist() == [str(n) for n in range(20_000)]
    with pytest.raises(pa.ArrowException):
        write_rows(out, iter([empty | {"row": "no number"}]))
    assert pq.read_metadata(out).num_rows == 20_000 and len(list(tmp_path.iterdir())) == 1
