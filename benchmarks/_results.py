# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder have in common: their options for the record, and how it is written."""

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has; the first line of `description` is shown."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--note", default="", help="what else ran on the machine, for the record")
    made.add_argument("--out", type=Path, help="file to write, beside standard output")
    return made


def operations(run: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds that `run` spends on the CPU in each of PyTorch's operations, from the longest on.

    Those of less than 1 % are summed under "others". Recording adds a little to each, so the sum is more than the time
    of an unrecorded run.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    spent = {event.key: event.self_cpu_time_total / 1e3 for event in profile.key_averages()}
    least = 0.01 * sum(spent.values())
    shown = {name: round(spent[name], 1) for name in sorted(spent, key=lambda n: -spent[n]) if spent[name] >= least}
    return {**shown, "others": round(sum(value for value in spent.values() if value < least), 1)}


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
    from transformers_fastvlm.bench.machine import machine, versions

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
