# SPDX-License-Identifier: Apache-2.0
"""Digests notice every change of a file, wherever in it and however its times are kept."""

import os
from pathlib import Path

import pytest

from transformers_fastvlm.storage.digests import counted_bytes, file_digest, file_digests, joined

LARGE = 2**27


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "file"
    with open(path, "wb") as sparse:
        sparse.truncate(LARGE)
    return path


@pytest.mark.parametrize(
    ("start", "size"),
    [(0, 1), (2**16 + 1000, 12_000), (LARGE // 2, 1), (LARGE - 1, 1), (LARGE, 1)],
    ids=["first", "12 kB", "middle", "last", "longer"],
)
def test_any_change_is_noticed(large: Path, start: int, size: int) -> None:
    before, times = file_digest(large), os.stat(large)
    with open(large, "r+b") as file:
        file.seek(start)
        file.write(b"x" * size)
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(large) != before


def test_of_several_files_in_their_order(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(20)]
    for number, file in enumerate(files):
        file.write_bytes(bytes(number))
    assert file_digests(files) == [file_digest(file) for file in files]
    assert file_digests([]) == []
    with pytest.raises(FileNotFoundError):
        file_digests([*files, tmp_path / "gone"])


def test_of_several_texts() -> None:
    texts = [["a", "b"], ["b", "a"], ["ab"], ["a"], [], ["\udce9"]]
    assert len({joined(each) for each in texts}) == len(texts)


def test_bytes_are_counted_while_files_are_read(tmp_path: Path) -> None:
    sizes = [0, 1, 5 * 2**20, 2**23]
    files = [tmp_path / str(number) for number in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    told: list[tuple[int, int]] = []
    digests = file_digests(files, counted_bytes(lambda done, total: told.append((done, total)), files))
    assert digests == file_digests(files)
    assert [done for done, _ in told] == sorted(done for done, _ in told) and len(told) >= 4
    assert {total for _, total in told} == {sum(sizes)} and told[-1][0] == sum(sizes)


def test_no_file_is_read_further_after_ctrl_c(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        with open(file, "wb") as sparse:
            sparse.truncate(2**32)  # seconds of work
    told: list[int] = []

    def advance(size: int) -> None:
        told.append(size)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file_digests(files, advance)
    assert len(told) <= len(files)
