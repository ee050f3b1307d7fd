# SPDX-License-Identifier: Apache-2.0
"""Print how much disk space the package takes with its required dependencies, as README.md states it.

    python tools/install_size.py

It adds the sizes that the installed packages recorded, in the environment that runs it. Extras are left out. Packages
that only a GPU needs are counted apart.
"""

import re
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "transformers-fastvlm"
FOR_CUDA = re.compile(r"nvidia-|cuda-|triton$")


def required(wanted: Requirement, found: dict[str, int]) -> dict[str, int]:
    """Add the size in bytes of a distribution, and of all that it requires here, to `found`."""
    try:
        distribution = metadata.distribution(wanted.name)
    except metadata.PackageNotFoundError:  # a requirement for another platform
        return found
    key = canonicalize_name(wanted.name) + "".join(sorted(wanted.extras))
    if key in found:
        return found
    found[key] = 0 if wanted.extras else sum(file.size or 0 for file in distribution.files or ())
    for line in distribution.requires or ():
        inner = Requirement(line)
        if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in (*wanted.extras, "")):
            required(inner, found)
    if wanted.extras:  # the distribution itself, without the extras
        required(Requirement(wanted.name), found)
    return found


def main() -> None:
    """Print the two sums."""
    sizes = required(Requirement(PACKAGE), {})
    cuda = sum(size for name, size in sizes.items() if FOR_CUDA.match(name))
    print(f"{sum(sizes.values()) / 1e9:.1f} GB in {len(sizes)} packages, {cuda / 1e9:.1f} GB of it for CUDA")


if __name__ == "__main__":
    main()
