# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder have in common: their options for the record, and how it is written."""

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has; the first line of `description` is shown."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--note", default="", help="what else ran on the machine, for the record")
    made.add_argument("--out", type=Path, help="file to write, beside standard output")
    return made


def write(
    options: argparse.Namespace, values: dict[str, Any], *, device: str = "cpu", packages: Sequence[str] = ()
) -> None:
    """Print what was measured, with the machine, the versions and the note, and write it to --out.

    Args:
        options: of the script, from `parser`.
        values: what was measured and how.
        device: which torch measured on.
        packages: further ones whose versions count, where they are installed.
    """
    import torch

    from transformers_fastvlm.benchmarking.machine import machine, versions

    found = versions()
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {**values, "machine": machine(torch.device(device)), "versions": found, "note": options.note}
    text = json.dumps(record, indent=2) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
