# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several verbs have in common."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from ..engines.base import MAX_TEMPERATURE

DEFAULT_MODEL = "apple/FastVLM-0.5B"
SIZE_STEP = 64


class DtypeName(enum.StrEnum):
    """Values of --dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class EngineName(enum.StrEnum):
    """Values of --engine."""

    transformers = "transformers"
    vllm = "vllm"
    onnx = "onnx"


def _multiple_of_64(size: int | None) -> int | None:
    if size is not None and size % SIZE_STEP:
        lower = size - size % SIZE_STEP
        raise typer.BadParameter(f"{size} is not a multiple of 64; the nearest are {lower} and {lower + SIZE_STEP}.")
    return size


def _temperature(value: float) -> float:
    if not 0 <= value <= MAX_TEMPERATURE:  # false for nan as well, which no minimum of an option refuses
        raise typer.BadParameter(f"{value} is not a number from 0 (greedy) to {MAX_TEMPERATURE:g}.")
    return value


def _colour(colour: str) -> str:
    from ..images.read_options import as_colour

    try:
        as_colour(colour)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return colour


def utf8(text: str | None) -> str | None:
    """Refuse a text of the command line whose bytes are not UTF-8."""
    if text is not None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise typer.BadParameter("the text is not UTF-8; convert it, or set the terminal to UTF-8.") from error
    return text


NAMES = (
    "Directory of a checkpoint, its name on the Hugging Face hub, or tiny, the test model that ships with the package."
)
Model = Annotated[str, typer.Option("--model", "-m", envvar="FASTVLM_MODEL", help=NAMES)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", envvar="FASTVLM_MODEL", help=NAMES)]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=NAMES)]
OutDirectory = Annotated[
    Path, typer.Argument(metavar="OUT", help="New directory to write; an existing one must be empty.")
]
RecordFile = Annotated[Path | None, typer.Option("--out", help="File for the record, in JSON.")]
Device = Annotated[str, typer.Option(help="auto (CUDA, else Apple's GPU, else the CPU), cpu, cuda, cuda:1, mps, …")]
Dtype = Annotated[
    DtypeName, typer.Option(help="auto is the checkpoint's own, but float32 for a float16 checkpoint on a CPU.")
]
Engine = Annotated[
    EngineName,
    typer.Option(help="What runs the model: transformers; vllm, where it is installed; onnx for an export's folder."),
]
Precision = Annotated[
    str | None, typer.Option(help="Of the engine onnx: which of an export's precisions, such as q4f16.")
]
Size = Annotated[
    int | None,
    typer.Option(
        min=256,
        max=2048,
        callback=_multiple_of_64,
        help="Height and width in pixels that pictures are resized to, a multiple of 64: smaller is faster, larger "
        "shows more detail. Default: what the checkpoint was trained for.",
    ),
]
System = Annotated[str | None, typer.Option(callback=utf8, help="System message in place of the chat template's own.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        callback=_temperature,
        help="From 0 to 2. 0 always takes the likeliest token, so the same question gets the same answer; above 0 "
        "samples. Apple's own script samples at 0.2.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens that reach this probability together."),
]
NumBeams = Annotated[int, typer.Option(min=1, help="Beams of a beam search; above 1 the answer comes all at once.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling, to get an answer again.")]
ExifTranspose = Annotated[
    bool,
    typer.Option(
        "--exif-transpose/--no-exif-transpose",
        help="Turn images as their EXIF orientation says, as viewers do; or take them as they are stored, as Apple's "
        "code does.",
    ),
]
AlphaBackground = Annotated[
    str,
    typer.Option(
        metavar="COLOUR",
        callback=_colour,
        help="Colour that transparent images are laid on, as a name or #rrggbb; or none, which drops the "
        "transparency and shows what was hidden, as Apple's code does.",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Largest image that is read, in pixels. Default: 89 million, against decompression bombs."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
