# SPDX-License-Identifier: Apache-2.0
"""The journal of `fastvlm batch`: cut off anywhere it is gone on with, and what differs between runs is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from transformers_fastvlm.batch.batch_journal import BatchJournal
from transformers_fastvlm.batch.outputs import require_format, subtitles, write_rows
from transformers_fastvlm.storage.atomic_files import state_of
from transformers_fastvlm.storage.journal_file import JournalError

RUN: dict[str, Any] = {
    "model": "a",
    "prompt": "What?",
    "seed": None,
    "stop": ("x",),
    "inputs": [{"name": "photos", "count": 1200, "digest": "d"}],
    "model_files": {"config.json": "d"},
}


def row(index: int) -> dict[str, Any]:
    return {"index": index, "answer": f"naïve 日本 {index}\n", "name": "\udce9"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.journal"


def write(path: Path, batches: list[list[int]], run: dict[str, Any] = RUN, **options: Any) -> None:
    journal = BatchJournal(path, run, **options)
    for batch in batches:
        journal.append([row(index) for index in batch])
    journal.close()


def test_goes_on_after_a_cut(path: Path, tmp_path: Path) -> None:
    write(path, [[2, 0], [1], [4, 3]])
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    cuts = {*range(0, len(whole), 41), *(end + near for end in ends for near in (-1, 0, 1)), len(whole)}
    for cut in sorted(cuts - {len(whole) + 1}):
        path.write_bytes(whole[:cut])
        journal = BatchJournal(path, RUN)
        done = max(0, sum(end <= cut for end in ends) - 1)
        assert (journal.batches, journal.rows) == (done, [0, 2, 3, 5][done]), cut
        for batch in [[2, 0], [1], [4, 3]][done:]:
            journal.append([row(index) for index in batch])
        assert path.read_bytes() == whole
        journal.close()


def test_rows_in_order(path: Path) -> None:
    journal = BatchJournal(path, RUN)
    for batch in ([3, 1], [0, 2], [5], [4]):
        journal.append([row(index) for index in batch])
    assert list(journal.in_order()) == [{k: v for k, v in row(i).items() if k != "index"} for i in range(6)]
    journal.append([row(7)])
    with pytest.raises(JournalError, match="lacks row 6"):
        list(journal.in_order())
    journal.remove()
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt": "Who?"},
            r"belongs to a run with prompt 'What\?', not 'Who\?'\. Repeat the original command, or .* --restart",
        ),
        ({"seed": 4, "model": "b"}, "model 'a', not 'b'; seed None, not 4"),
        ({"stop": ()}, r"stop \['x'\], not \[\]"),
        ({"model_files": {"config.json": "e"}}, "different model files under the same name"),
        ({"inputs": [{"name": "p", "count": 1, "digest": "d"}]}, "the inputs photos, not p"),
        ({"inputs": [{"name": "photos", "count": 1300, "digest": "d"}]}, "1,200 files or rows of photos.* has 1,300"),
        ({"inputs": [{"name": "photos", "count": 1200, "digest": "e"}]}, "different content in photos"),
    ],
)
def test_says_what_differs(path: Path, change: dict[str, Any], message: str) -> None:
    write(path, [[0]])
    before = path.read_bytes()
    with pytest.raises(JournalError, match=message):
        BatchJournal(path, RUN | change)
    assert path.read_bytes() == before
    write(path, [[0]], RUN | change, restart=True)
    assert json.loads(path.read_text().splitlines()[0])["run"] == json.loads(json.dumps(RUN | change))
    # A run that has done nothing yet is no loss.
    write(path, [], RUN, restart=True)
    write(path, [[0]], RUN | change)


def test_batches_in_another_order_are_damage(path: Path) -> None:
    write(path, [[0], [1], [2]])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], lines[3]]))
    with pytest.raises(JournalError, match=f"damaged at byte {len(lines[0])}"):
        BatchJournal(path, RUN)


@pytest.mark.parametrize("batches", [[], [[0]]])
def test_a_run_that_did_nothing_leaves_no_journal(path: Path, batches: list[list[int]]) -> None:
    def run() -> None:
        with BatchJournal(path, RUN) as journal:
            for batch in batches:
                journal.append([row(index) for index in batch])
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        run()
    assert path.exists() == bool(batches)


# Outputs


def test_jsonl_replaces_the_file_only_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")

    def rows(last: bool) -> Any:
        yield {"a": "naïve\n"}
        if not last:
            raise OSError("disk")
        yield {"a": "\ud800"}

    with pytest.raises(OSError, match="disk"):
        write_rows(out, rows(False))
    assert out.read_text() == "old"
    with pytest.raises(FileExistsError, match="is not replaced"):
        write_rows(out, rows(True))
    write_rows(out, rows(True), state_of(out))
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == [{"a": "naïve\n"}, {"a": "\ud800"}]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_refuses_outputs(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in (
        ("out.txt", r"expected a name that ends in \.jsonl, \.parquet, \.srt"),
        ("folder.jsonl", "is a folder"),
        ("gone/out.jsonl", "does not exist; create it first"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            require_format(tmp_path / name)


def test_subtitles() -> None:
    rows = [
        {"time": 0.0, "answer": " A dog.\n\nIt --> runs. "},
        {"time": 2.5, "answer": None},
        {"time": 5.0, "answer": ""},
        {"time": 3599.9996, "answer": "End"},
        {"time": None, "answer": None},
    ]
    assert "".join(subtitles(rows, 2.5)) == (
        "1\n00:00:00,000 --> 00:00:02,500\nA dog. It → runs.\n\n2\n01:00:00,000 --> 01:00:02,500\nEnd\n\n"
    )
