# SPDX-License-Identifier: Apache-2.0
"""tools/environment.py, with uv and packages of the test's own, and without a network."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with folders of locks and wheels: "nowhere" 2.0 for another machine and 1.0 for all machines."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (ROOT / ".venvs" / "uv").exists():
        pytest.skip("uv has not been brought in yet; every command of the Makefile does it")
    locks, wheels = tmp_path / "requirements", tmp_path / "wheels"
    locks.mkdir()
    wheels.mkdir()
    for name in ("uv.txt", "build.txt"):
        (locks / name).write_text((ROOT / "requirements" / name).read_text())
    wheel(wheels, "nowhere", "2.0", "cp39-cp39-win_arm64")
    wheel(wheels, "nowhere", "1.0", "py3-none-any")
    wheel(wheels, "extra_one", "1.0", "py3-none-any")
    monkeypatch.setattr(module, "LOCKS", locks)
    for name, value in {"UV_OFFLINE": "1", "UV_FIND_LINKS": str(wheels), "UV_NO_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)
    return module


def wheel(folder: Path, name: str, version: str, tag: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def write(environment: ModuleType, name: str, lock: str, wanted: str = "") -> None:
    (environment.LOCKS / f"{name}.txt").write_text(lock)
    (environment.LOCKS / f"{name}.in").write_text(wanted)


def version_of(folder: Path, module: str, environment: ModuleType) -> str | None:
    code = f"import {module}; print({module}.version)"
    done = subprocess.run([environment.python_of(folder), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def test_a_lock_is_followed_and_kept_up_with(
    environment: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "environment"
    write(environment, "dev", "nowhere==1.0\nextra-one==1.0\n")
    write(environment, "package", "nowhere==1.0\n")
    environment.make(folder, "dev", package=())
    environment.make(folder, "package", package=(), keep=True)
    assert version_of(folder, "nowhere", environment) == version_of(folder, "extra_one", environment) == "1.0"
    environment.make(folder, "package", package=())
    assert version_of(folder, "nowhere", environment) == "1.0"
    assert version_of(folder, "extra_one", environment) is None
    assert "NOT LOCKED" not in capfd.readouterr().err


@pytest.mark.parametrize("keep", [False, True])
def test_where_a_lock_does_not_fit_the_newest_are_installed_and_it_says_so(
    environment: ModuleType, keep: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "environment"
    write(environment, "dev", "nowhere==2.0\n", "nowhere>=1\n")
    environment.make(folder, "dev", package=(), keep=keep)
    assert version_of(folder, "nowhere", environment) == "1.0"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "NOT LOCKED" in line]
    python = ".".join(map(str, sys.version_info[:3]))
    assert f"requirements/dev.txt cannot be installed with Python {python} on " in line
    assert "nowhere" in line.partition("What uv said:")[2], line


def test_where_nothing_fits_it_ends(environment: ModuleType, tmp_path: Path) -> None:
    write(environment, "dev", "nowhere==2.0\n", "nowhere>=2\n")
    with pytest.raises(SystemExit, match=r"The newest versions cannot be installed with Python .* either"):
        environment.make(tmp_path / "environment", "dev", package=())
