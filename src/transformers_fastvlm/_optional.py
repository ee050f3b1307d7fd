# SPDX-License-Identifier: Apache-2.0
"""Imports of optional packages: one that is missing, or broken by another, is named with its version and the cure."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator

__all__ = ["needs", "with_version"]


@contextlib.contextmanager
def needs(package: str, why: str, cure: str) -> Iterator[None]:
    """Explain what goes wrong in a block that imports an optional package and does nothing else.

    Args:
        package: the name that pip knows it by, such as "lmms-eval".
        why: what needs it, as the subject of a sentence.
        cure: a command, such as `pip install "transformers-fastvlm[eval]"`.

    Raises:
        ImportError: the package is not installed, or it is and fails: because of the version of another package, say.
    """
    module = package.replace("-", "_")
    try:
        yield
    except Exception as error:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{why} needs {package}: {cure}", name=module) from error
        # An ImportError knows the module that it is about. Others blame no one but the package that was asked for.
        other = (getattr(error, "name", None) or module).partition(".")[0]
        blamed = "" if other == module else f" beside {with_version(other)}"
        raise ImportError(
            f"{why} needs {package}, and {with_version(module)} cannot be imported{blamed}: {error}. "
            f"Versions that go together: {cure}",
            name=module,
        ) from error


def with_version(module: str) -> str:
    """Return the name and version of the package that a module comes from, or say that it is not installed."""
    packages = importlib.metadata.packages_distributions().get(module)
    if packages:
        return f"{packages[0]} {importlib.metadata.version(packages[0])}"
    return module if importlib.util.find_spec(module) else f"{module}, which is not installed"
