# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several verbs share."""

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
    llamacpp = "llamacpp"


def _multiple_of_64(size: int | None) -> int | None:
    if size is not None and size % SIZE_STEP:
        lower = size - size % SIZE_STEP
        raise typer.BadParameter(f"{size} is not a multiple of 64; the nearest are {lower} and {lower + SIZE_STEP}.")
    return size


def _temperature(value: float) -> float:
    if not 0 <= value <= MAX_TEMPERATURE:  # also false for nan, which Typer's min and max accept
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
    """Refuse text from the command line that is not UTF-8."""
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
    Path, typer.Argument(metavar="OUT", help="Directory to create; an existing one must be empty.")
]
RecordFile = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the record to.")]
Device = Annotated[str, typer.Option(help="auto (CUDA, else Apple's GPU, else the CPU), cpu, cuda, cuda:1, mps, …")]
Dtype = Annotated[
    DtypeName, typer.Option(help="auto: the checkpoint's dtype, but float32 for a float16 checkpoint on a CPU.")
]
Engine = Annotated[
    EngineName,
    typer.Option(
        help="Runtime: transformers; vllm, if it is installed; onnx, if the model is an ONNX export (--device auto, "
        "cpu, cuda, directml or coreml); llamacpp, if it is a GGUF export (--device auto, cpu or gpu)."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(help="With --engine onnx and llamacpp: a precision of the export, such as q4f16 or q4_0."),
]
Size = Annotated[
    int | None,
    typer.Option(
        min=256,
        max=2048,
        callback=_multiple_of_64,
        help="Height and width of images in pixels, a multiple of 64; smaller is faster. Default: the checkpoint's.",
    ),
]
System = Annotated[str | None, typer.Option(callback=utf8, help="System message that replaces the chat template's.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        callback=_temperature,
        help="Sampling temperature from 0, which is greedy decoding, to 2. Apple's script uses 0.2.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Sample from the most probable tokens with this total probability."),
]
NumBeams = Annotated[int, typer.Option(min=1, help="Beams of beam search; above 1 the answer is not streamed.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Random seed for sampling; repeats an answer.")]
SchemaFile = Annotated[
    Path | None,
    typer.Option("--schema", metavar="FILE", help="JSON file with the JSON schema that the answer follows."),
]
Choices = Annotated[
    str | None,
    typer.Option(callback=utf8, metavar="A,B,C", help="Allowed answers, separated by commas."),
]
Regex = Annotated[str | None, typer.Option(callback=utf8, help="Regular expression that the whole answer matches.")]
ExifTranspose = Annotated[
    bool,
    typer.Option(
        "--exif-transpose/--no-exif-transpose",
        help="Apply the EXIF rotation of images, as viewers do. Apple's code does not.",
    ),
]
AlphaBackground = Annotated[
    str,
    typer.Option(
        metavar="COLOUR",
        callback=_colour,
        help="Background colour for transparent images: a name, #rrggbb, or none, which drops the alpha channel, as "
        "Apple's code does.",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum pixels of an image. Default: 89 million."),
]
ImageColumn = Annotated[str, typer.Option(help="Column of a table with the paths or the bytes of images.")]
ImageFolder = Annotated[
    Path | None,
    typer.Option(help="Folder that a table's paths are relative to and may not leave. Default: the table's folder."),
]
Every = Annotated[float, typer.Option(help="Seconds between the sampled frames of a video.")]
Restart = Annotated[bool, typer.Option("--restart", help="Discard earlier progress and replace the output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
