# SPDX-License-Identifier: Apache-2.0
"""Late imports: optional packages, whose errors name the command to fix them, and a package's own public names."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["lazy_names", "needs", "with_version"]


def lazy_names(package: str, modules: dict[str, str]) -> tuple[Any, Any, list[str]]:
    """Return a package's `__getattr__`, `__dir__` and `__all__`: a name is imported when it is first used.

    Args:
        package: its `__name__`.
        modules: public names, with spaces between them, by module.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{module_of[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *module_of}), sorted(module_of)


@contextlib.contextmanager
def needs(package: str, why: str, cure: str, *, module: str | None = None) -> Iterator[None]:
    """Explain import errors of a block that only imports an optional package.

    Args:
        package: its name on PyPI, such as "lmms-eval".
        why: the feature that needs it, as the subject of a sentence.
        cure: a command, such as `pip install "transformers-fastvlm[eval]"`.
        module: the package's module, if it has another name.

    Raises:
        ImportError: the package is not installed, or its import fails, e.g. because of another package's version.
    """
    module = module or package.replace("-", "_")
    try:
        yield
    except Exception as error:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{why} needs {package}: {cure}", name=module) from error
        # An ImportError names the module that failed. Other errors are attributed to the requested package.
        other = (getattr(error, "name", None) or module).partition(".")[0]
        blamed = "" if other == module else f" beside {with_version(other)}"
        raise ImportError(
            f"{why} needs {package}, and {with_version(module)} cannot be imported{blamed}: {error}. "
            f"Install compatible versions: {cure}",
            name=module,
        ) from error


def with_version(module: str) -> str:
    """Return the name and version of the package that provides a module, or a text that it is not installed."""
    packages = importlib.metadata.packages_distributions().get(module)
    if packages:
        return f"{packages[0]} {importlib.metadata.version(packages[0])}"
    return module if importlib.util.find_spec(module) else f"{module}, which is not installed"
