# SPDX-License-Identifier: Apache-2.0
"""A benchmark run: one process for each case, the cases of a group in turns, and the record."""

import contextlib
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Options, cases
from .measuring import ratio, spread, surroundings
from .photo import photo_jpeg
from .worker_process import WorkerProcess, run_in_turns

__all__ = ["FORMAT", "Progress", "run"]

FORMAT = 1
"""Version of the record's format."""

PHOTO_SIDE = 3456
"""The drawn image is a square of 12 megapixels, so that no model crops it and LLaVA-OneVision's tiles are full, as in
the paper."""

PARTS = ("preprocess", "encode", "project", "prefill")
"""Parts of the time to the first token, in their order."""

_RATIOS = ("preprocess", "encode", "prefill", "first_token", "first_token_from_pixels", "first_decode", "decode")


Progress = Callable[[int, int, str], None]


def run(options: Options, progress: Progress = lambda done, total, doing: None) -> dict[str, Any]:
    """Measure all cases of `options` and return the record, which `json` can write.

    Every case runs in a separate process, which makes its peak memory measurable. Compared cases are loaded at the same
    time and run alternately, so that background load affects all of them.

    Args:
        progress: called before each case is built and before each round: the number of steps done and in all, and the
            next one.

    Raises:
        ValueError: the device is not available, or a model cannot be built.
        ImportError: an optional package is missing.
        RuntimeError: a process died, for instance out of memory.
    """
    device = check_device(options.device)
    results = []
    groups = [list(group) for _, group in groupby(cases(options), key=lambda case: case.group)]
    turns = options.warmup + options.repetitions
    total = sum(len(group) + turns for group in groups)
    done = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        image_file = options.image
        if image_file is None:
            image_file = str(Path(folder) / "photo.jpg")
            Path(image_file).write_bytes(photo_jpeg(PHOTO_SIDE, PHOTO_SIDE))
        for group in groups:
            results += _run_group(group, options, image_file, lambda doing: progress(next(done), total, doing))
        width, height = _size_of(image_file)
    return {
        "format": FORMAT,
        "kind": "models",
        **surroundings(device),
        "options": options.as_dict(),
        "picture": {"drawn": options.image is None, "width": width, "height": height},
        "results": results,
        "ratios": _ratios(results),
    }


def check_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ValueError: torch does not know the device, or it is not available.
    """
    expected = "expected cpu, cuda (or cuda:1 and so on) or mps."
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device is {name!r}, which is not available (torch {torch.__version__}); {expected}"
        ) from error
    return device


def _size_of(image_file: str) -> tuple[int, int]:
    from ..images.decoding import open_image
    from ..images.reading import open_file

    what = f"the image file {image_file!r}"
    with open_file(image_file, what) as file, open_image(file, what) as image:
        return image.size


def _run_group(
    group: list[Case], options: Options, image_file: str, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        workers = []
        for case in group:
            progress(f"building {_name(case)}")
            worker = stack.enter_context(WorkerProcess(_name(case), options.threads))
            worker.facts = worker.ask({"case": asdict(case), "options": options.as_dict(), "image": image_file})
            workers.append(worker)
        runs = run_in_turns(workers, options.warmup, options.repetitions, progress)
        return [
            _result(case, options, worker.facts, own) for case, worker, own in zip(group, workers, runs, strict=True)
        ]


def _name(case: Case) -> str:
    side = "" if case.resolution is None else f" {case.resolution} px"
    return f"{case.label}{side} {case.dtype} batch {case.batch}"


def _result(case: Case, options: Options, facts: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    timed = runs[options.warmup :]
    whole = "unsplit_from_pixels"
    names = [*PARTS, *(name for name in timed[0]["seconds"] if name not in (*PARTS, whole))]
    names = [name for name in names if name in timed[0]["seconds"]]
    seconds = {name: spread([run["seconds"][name] for run in timed]) for name in names}
    # The unsplit time may have been measured only in the warm-up.
    unsplit = [[run["seconds"][whole] for run in some if whole in run["seconds"]] for some in (timed, runs)]
    seconds[whole] = spread(unsplit[0] or unsplit[1])
    load = {"import": facts["import_seconds"], "model": facts["load_seconds"]}
    result = {
        "model": case.label,
        **{name: getattr(case, name) for name in ("kind", "source", "resolution", "dtype", "batch")},
        "fused": case.fuse,
        "reference": None if case.reference is None else {"model": case.reference[0], "resolution": case.reference[1]},
        **{name: value for name, value in facts.items() if name != "import_seconds"},
        "load_seconds": {name: round(value, 3) for name, value in load.items()},
        "seconds": seconds,
        "tokens_per_second": spread([case.batch / run["seconds"]["decode"] for run in timed]),
    }
    if torch.device(options.device).type == "cpu":
        result["processor_seconds"] = {
            name: spread([run["processor_seconds"][name] for run in timed]) for name in names
        }
    return result | {name: runs[-1][name] for name in ("peak_bytes", "imports_bytes")}


def _ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratio of each result's median times to those of its reference."""
    found = []
    for result in results:
        if result["reference"] is None:
            continue
        same = {name: result[name] for name in ("dtype", "batch")} | result["reference"]
        other = next(other for other in results if all(other[name] == value for name, value in same.items()))
        measure = "processor_seconds" if "processor_seconds" in result else "seconds"
        for kind in dict.fromkeys(("seconds", measure)):
            times, own = ({name: value["median"] for name, value in which[kind].items()} for which in (result, other))
            ratios = {name: ratio(times[name], own[name]) for name in _RATIOS if name in times and own.get(name)}
            about = {name: result[name] for name in ("model", "resolution", "dtype", "batch")}
            reference = {"over": other["model"], "over_resolution": other["resolution"]}
            found.append({**about, **reference, "of": kind, "ratios": ratios})
    return found
