# SPDX-License-Identifier: Apache-2.0
"""Error messages for an optional package that is missing, or broken by another package's version."""

import importlib
import sys
from pathlib import Path

import pytest

from transformers_fastvlm._optional import needs, with_version
from transformers_fastvlm.evaluation.tasks import import_harness

CURE = 'pip install "transformers-fastvlm[eval]"'


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for installed packages, first on the path; modules imported from it are removed afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] in ("lmms_eval", "filelock_like")]:
        monkeypatch.delitem(sys.modules, module)
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] in ("lmms_eval", "filelock_like")]:
        del sys.modules[module]


def install(folder: Path, name: str, version: str, **files: str) -> None:
    """Install a package like pip: its modules, and metadata that lists them."""
    module = name.replace("-", "_")
    (folder / module).mkdir()
    for file, text in files.items():
        (folder / module / f"{file}.py").write_text(text)
    metadata = folder / f"{module}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "top_level.txt").write_text(f"{module}\n")
    importlib.invalidate_caches()


def test_a_package_that_another_version_breaks(packages: Path) -> None:
    """lmms-eval 0.7.3 imports a name that filelock 4.3 does not have."""
    install(packages, "filelock-like", "4.3.1", __init__="")
    install(packages, "lmms-eval", "0.7.3", __init__="", evaluator="from filelock_like import SoftLock\n")
    with pytest.raises(ImportError) as caught:
        import_harness()
    said = str(caught.value)
    assert said.startswith("fastvlm eval needs lmms-eval, and lmms-eval 0.7.3 cannot be imported beside ")
    assert "filelock-like 4.3.1" in said and "cannot import name 'SoftLock'" in said and CURE in said
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import nothing_of_this_name", "beside nothing_of_this_name, which is not installed: No module named"),
        ("from . import absent", "lmms-eval 0.7.3 cannot be imported: cannot import name 'absent'"),
        ("raise RuntimeError('operator does not exist')", "0.7.3 cannot be imported: operator does not exist. "),
    ],
)
def test_each_way_to_break(packages: Path, line: str, said: str) -> None:
    install(packages, "lmms-eval", "0.7.3", __init__="", evaluator=line)
    with pytest.raises(ImportError, match="fastvlm eval needs lmms-eval") as caught:
        import_harness()
    assert said in str(caught.value) and CURE in str(caught.value)


def test_a_missing_package() -> None:
    with pytest.raises(ImportError) as caught, needs("no-such-package", "The plot", CURE):
        import no_such_package  # noqa: F401
    assert str(caught.value) == f"The plot needs no-such-package: {CURE}"


def test_a_package_whose_module_has_another_name(packages: Path) -> None:
    """As llama-cpp-python, whose module is llama_cpp."""
    with pytest.raises(ImportError) as caught, needs("some-python", "This", CURE, module="no_such_module"):
        import no_such_module  # noqa: F401
    assert str(caught.value) == f"This needs some-python: {CURE}"
    install(packages, "filelock-like", "4.3.1", __init__="raise OSError('no library')")
    with (
        pytest.raises(ImportError, match=r"some-python, and filelock-like 4\.3\.1 cannot be imported: no library"),
        needs("some-python", "This", CURE, module="filelock_like"),
    ):
        import filelock_like  # noqa: F401


def test_a_package_that_works_is_let_through() -> None:
    with needs("packaging", "This", CURE):
        import packaging as imported
    assert with_version("packaging") == f"packaging {imported.__version__}"
