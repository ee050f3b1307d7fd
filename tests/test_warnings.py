# SPDX-License-Identifier: Apache-2.0
"""Tests of `filterwarnings` in pyproject.toml: which warnings fail the suite, by their origin."""

import sys
import tomllib
import types
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILTERS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"][
    "filterwarnings"
]


def module(name: str, file: str) -> types.ModuleType:
    """Return a module with a function that calls another, and one that warns about its caller or about itself."""
    made = types.ModuleType(name)
    source = (
        "import warnings\n"
        "def deprecated(category, stacklevel=2): warnings.warn('spam is deprecated', category, stacklevel=stacklevel)\n"
        "def call(function, *arguments): return function(*arguments)\n"
    )
    exec(compile(source, file, "exec"), made.__dict__)
    return made


LIBRARY = module("library", "site-packages/library.py")
OTHER = module("other_library.inner", "site-packages/other_library/inner.py")
OURS = module("transformers_fastvlm.processing_fastvlm", "src/transformers_fastvlm/processing_fastvlm.py")
TEST = module("test_processing", "tests/test_processing.py")
CALL = module("torch.nn.modules.module", "site-packages/torch/nn/modules/module.py")
DECORATOR = module("transformers.utils.output_capturing", "site-packages/transformers/utils/output_capturing.py")


@pytest.mark.parametrize(
    ("caller", "category", "fails"),
    [
        (OURS, DeprecationWarning, True),
        (OURS, PendingDeprecationWarning, True),
        (OURS, FutureWarning, True),
        (OURS, UserWarning, True),
        (TEST, DeprecationWarning, True),
        (TEST, FutureWarning, True),
        (CALL, FutureWarning, True),
        (DECORATOR, FutureWarning, True),
        (CALL, DeprecationWarning, False),
        (OTHER, DeprecationWarning, False),
        (OTHER, PendingDeprecationWarning, False),
        (OTHER, FutureWarning, False),
        (OTHER, SyntaxWarning, False),
        (OTHER, UserWarning, True),
        (OTHER, RuntimeWarning, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_who_calls_what_is_deprecated_decides(
    caller: types.ModuleType, category: type[Warning], fails: bool, pytestconfig: pytest.Config
) -> None:
    assert pytestconfig.getini("filterwarnings") == FILTERS
    assert outcome(caller.call, LIBRARY.deprecated, category) == fails


def test_what_a_library_says_about_itself_is_shown() -> None:
    assert not outcome(OURS.call, LIBRARY.deprecated, DeprecationWarning, 1)


def outcome(function: types.FunctionType, *arguments: object) -> bool:
    """Return whether a warning of `function` becomes an error under the suite's filters, which are active here."""
    with warnings.catch_warnings(record=True) as shown:
        try:
            function(*arguments)
        except Warning:
            return True
    assert len(shown) == 1
    return False


@pytest.mark.parametrize("place", ["site-packages/library/inner.py", "torchao/quantization/quant_api.py"])
def test_a_librarys_source_may_be_old(place: str, tmp_path: Path) -> None:
    """Python warns about an invalid escape when it first compiles a module."""
    file = tmp_path / place
    with warnings.catch_warnings(record=True) as shown:
        compile(r'"\."', str(file), "exec")
    assert [entry.category for entry in shown] == [SyntaxWarning if sys.version_info >= (3, 12) else DeprecationWarning]
