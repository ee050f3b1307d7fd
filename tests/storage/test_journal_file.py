# SPDX-License-Identifier: Apache-2.0
"""Journals: whole batches or nothing, wherever they are cut; one process at a time; other files are left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transformers_fastvlm.storage.journal_file import JournalError, JournalFile

BATCHES: list[dict[str, Any]] = [{"a": 1}, {"b": "naïve 日本\n \ud83d"}, {"c": [None, 2.5]}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


class Journal(JournalFile):
    kind = "fastvlm_test"

    def __init__(self, path: Path, restart: bool) -> None:
        self.found: list[Any] = []
        super().__init__(path, restart)

    def take(self, batch: Any) -> None:
        self.found.append(batch)


def opened(path: Path, restart: bool = False) -> tuple[Journal, list[Any]]:
    journal = Journal(path, restart)
    return journal, journal.found


def write(path: Path, batches: list[dict[str, Any]] = BATCHES) -> bytes:
    journal, _ = opened(path)
    journal.begin({"run": 7})
    for batch in batches:
        journal.append_line(batch)
    assert list(journal.lines()) == batches
    journal.close()
    return path.read_bytes()


def test_batches_are_found_again(path: Path) -> None:
    write(path)
    journal, found = opened(path)
    assert (journal.header, found) == ({"run": 7}, BATCHES)
    assert list(journal.lines()) == list(journal.lines()) == BATCHES
    journal.append_line({"d": 4})
    assert list(journal.lines()) == [*BATCHES, {"d": 4}]
    journal.close()
    journal, found = opened(path, restart=True)
    assert (journal.header, found, path.stat().st_size) == (None, [], 0)
    journal.remove()
    assert not path.exists()


def test_a_batch_that_was_cut_off_at_any_byte_is_dropped_and_the_others_are_kept(path: Path) -> None:
    whole = write(path)
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal, found = opened(path)
        done = max(0, sum(end <= cut for end in ends) - 1)
        assert (journal.header is not None, found) == (cut >= ends[0], BATCHES[:done]), cut
        if journal.header is None:
            journal.begin({"run": 7})
        for batch in BATCHES[done:]:
            journal.append_line(batch)
        journal.close()
        assert path.read_bytes() == whole, cut


@pytest.mark.parametrize("broken", [b'{"a": 1\n', b"\0\0\0\n", b"[]\n", b"\xff\n"])
def test_damage_before_the_end_says_where(path: Path, broken: bytes) -> None:
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], broken, *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(JournalError, match=f"damaged at byte {len(lines[0])}. Delete it to start over"):
        opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"a": 1}\n', b'{"fastvlm_test": 99, "run": 7}\n{}\n']
)
def test_a_file_of_another_kind_is_left_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(JournalError, match="not a journal of this version's fastvlm test"):
        opened(path)
    assert path.read_bytes() == content


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module for locks, by which a byte belongs to one descriptor, in place of the system's own."""
    owners: dict[tuple[int, int], int] = {}

    def locking(file: int, mode: int, size: int) -> None:
        assert (mode, size, os.lseek(file, 0, os.SEEK_CUR)) == (2, 1, 0)
        found = os.fstat(file)
        owner = owners.setdefault((found.st_dev, found.st_ino), file)
        try:
            alive = os.path.samestat(os.fstat(owner), found)
        except OSError:
            alive = False
        if owner != file and alive:
            raise PermissionError(13, "Permission denied")
        owners[found.st_dev, found.st_ino] = file

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))


@pytest.mark.parametrize("system", ["this", "windows"])
def test_one_run_at_a_time(path: Path, system: str, request: pytest.FixtureRequest) -> None:
    if system == "windows":
        request.getfixturevalue("windows")
    journal, _ = opened(path)
    journal.begin({})
    journal.append_line({"a": 1})
    for restart in (False, True):
        with pytest.raises(JournalError, match="in use by another run"):
            opened(path, restart)
    assert list(journal.lines()) == [{"a": 1}]
    journal.close()
    journal, found = opened(path)
    assert found == [{"a": 1}]
    journal.close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_the_lock_ends_with_a_process_that_is_killed(path: Path) -> None:
    script = (
        "import os, sys, signal\nfrom pathlib import Path\n"
        "from transformers_fastvlm.storage.journal_file import JournalFile\n"
        "JournalFile.kind = 'fastvlm_test'\njournal = JournalFile(Path(sys.argv[1]))\n"
        "journal.begin({'run': 7})\njournal.append_line({'a': 1})\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with pytest.raises(JournalError, match="in use"):
            opened(path)
        process.kill()
    journal, found = opened(path)
    assert found == [{"a": 1}]
    journal.close()
