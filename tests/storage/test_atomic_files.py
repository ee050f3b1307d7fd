# SPDX-License-Identifier: Apache-2.0
"""Files and folders are there whole or not at all, and nothing that is another's is replaced."""

import os
import stat
from pathlib import Path

import pytest

from transformers_fastvlm.storage.atomic_files import new_directory, publish_directory, replacing, state_of, write_lines

POSIX = pytest.mark.skipif(os.name == "nt", reason="permissions and links are those of POSIX")


def write(path: Path, content: bytes = b"new", fail: bool = False, **options: object) -> None:
    with replacing(path, **options) as file:  # type: ignore[arg-type]
        file.write(content)
        if fail:
            raise OSError("disk")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for before in (None, b"old"):
        with pytest.raises(OSError, match="disk"):
            write(path, fail=True)
        assert (path.read_bytes() if path.exists() else None) == before
        path.write_bytes(b"old")
    (tmp_path / "file.partial").write_text("of a process that was killed")
    write(path)
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("there", "only", "replaced"),
    [
        (None, (), True),
        (b"old", None, True),
        (b"old", ("its state",), True),
        (b"old", (), False),
        (b"old", ([1, 1],), False),
        (b"new", (), True),  # of a process that was killed just after this
    ],
)
def test_only_what_may_be_replaced_is(tmp_path: Path, there: bytes | None, only: object, replaced: bool) -> None:
    path = tmp_path / "file"
    if there is not None:
        path.write_bytes(there)
    only = (state_of(path),) if only == ("its state",) else only
    if replaced:
        write(path, only=only)
    else:
        with pytest.raises(FileExistsError, match="file' appeared, or was changed"):
            write(path, only=only)
    assert path.read_bytes() == (b"new" if replaced else there) and names(tmp_path) == ["file"]


def test_lines_with_half_characters(tmp_path: Path) -> None:
    write_lines(tmp_path / "file", ["naïve", "\ud83d"])
    assert (tmp_path / "file").read_bytes() == "naïve\n?\n".encode()


@POSIX
def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("there", "gone"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "there").touch()
    for name in ("there", "gone"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink() and (tmp_path / "disk" / name).read_bytes() == b"new"
    (tmp_path / "disk" / "folder").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "folder")
    with new_directory(tmp_path / "folder") as folder:
        (folder / "file").touch()
    assert (tmp_path / "folder").is_symlink() and names(tmp_path / "disk" / "folder") == ["file"]


@POSIX
def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "file.partial").symlink_to(tmp_path / "mine")
    write(tmp_path / "file")
    assert (tmp_path / "mine").read_text() == "mine" and names(tmp_path) == ["file", "mine"]


# Folders


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def make(fail: bool) -> None:
        with new_directory(tmp_path / "deep" / "out") as folder:
            (folder / "file").write_text("x")
            if fail:
                raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        make(fail=True)
    assert names(tmp_path / "deep") == []
    (tmp_path / "deep" / "out").mkdir()
    with pytest.raises(OSError, match="disk"):
        make(fail=True)
    assert names(tmp_path / "deep") == ["out"]
    make(fail=False)
    assert names(tmp_path / "deep" / "out") == ["file"] and names(tmp_path / "deep") == ["out"]
    with pytest.raises(FileExistsError, match="not an empty directory"):
        make(fail=False)


def test_what_appears_in_a_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make() -> None:
        with new_directory(out):
            out.mkdir()
            (out / "mine").touch()

    with pytest.raises(OSError, match="out"):
        make()
    assert names(out) == ["mine"] and names(tmp_path) == ["out"]


def test_a_published_folder_moves_another_aside(tmp_path: Path) -> None:
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publish_directory(tmp_path / "new", tmp_path / "out", aside=tmp_path / "aside")
    assert (names(tmp_path / "out"), names(tmp_path / "aside")) == (["new"], ["out"])


# Permissions


@POSIX
@pytest.mark.parametrize(("mask", "of_file", "of_folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int, of_file: int, of_folder: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "file")
        with new_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")]
    assert modes == [of_file, of_folder]


def test_the_umask_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the process: for a moment other threads would create files that all may write."""
    monkeypatch.setattr(os, "umask", None)
    write(tmp_path / "file")
    with new_directory(tmp_path / "folder"):
        pass
