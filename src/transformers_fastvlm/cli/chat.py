# SPDX-License-Identifier: Apache-2.0
"""`fastvlm chat`: several turns about one or more images."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .cli_errors import UserError, notice, one_line, reports_errors, warn
from .cli_images import STDIN, question, read_images, read_named_image

if TYPE_CHECKING:
    from ..engines import Engine, Sampling

__all__ = ["chat"]

_HELP = """\
/image PATH   add an image (file or http(s) URL) to the next question
/clear        start a new conversation with the images of the command line
/exit         end the chat, like Ctrl-D"""


@reports_errors
def chat(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Images to talk about: files or http(s) URLs.")
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    engine: options.Engine = options.EngineName.transformers,
    precision: options.Precision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DtypeName.auto,
    size: options.Size = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    num_beams: options.NumBeams = 1,
    seed: options.Seed = None,
    schema: options.SchemaFile = None,
    choices: options.Choices = None,
    regex: options.Regex = None,
    do_exif_transpose: options.ExifTranspose = True,
    alpha_background: options.AlphaBackground = "white",
    max_pixels: options.MaxPixels = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Talk about images in several turns.

    Each line is a question, and the model sees the whole conversation. /image PATH adds an image, /clear starts a new
    conversation, /exit ends the chat. Questions may also come from a pipe, one per line; the first error then ends the
    command.

    Examples:

        fastvlm chat street.jpg

        fastvlm chat street.jpg --temperature 0.2 --system "Answer in one word."
    """
    from ..images.read_options import ReadOptions
    from .asking import engine_settings, load, sampling_of, schema_of

    sampling = sampling_of(max_new_tokens, temperature, top_p, seed, num_beams, schema_of(schema, choices, regex))
    settings = engine_settings(engine, precision, device, dtype, size)
    if STDIN in (images or []):
        raise UserError("chat reads questions from standard input, so an image cannot come from there. Give a file.")
    reading = ReadOptions(do_exif_transpose=do_exif_transpose, alpha_background=alpha_background, max_pixels=max_pixels)
    first = read_images(images or [], reading)
    loaded = load(engine, model, settings)
    interactive = sys.stdin.isatty()
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, and the chat continues
    if interactive:
        notice(_HELP)
    talk = _Conversation(loaded, sampling, system, first, reading)
    with contextlib.closing(loaded):
        loaded.check(sampling)  # not at the first question
        while (line := _next_line(interactive)) is not None:
            try:
                if not talk.turn(line):
                    return
            except (UserError, OSError, ValueError) as error:
                if not interactive or debug or isinstance(error, BrokenPipeError):
                    raise
                warn(f"fastvlm: {one_line(error)}")


def _next_line(interactive: bool) -> str | None:
    """Return the next line of standard input, or None at its end."""
    try:
        if interactive and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() line editing)
            return input("> ")
        if interactive:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
    except EOFError:
        return None
    except KeyboardInterrupt:
        typer.echo(err=True)
        return None
    return line if line else None


class _Conversation:
    def __init__(
        self, engine: "Engine", sampling: "Sampling", system: str | None, images: list[Any], reading: Any
    ) -> None:
        self.engine, self.sampling, self.system, self.first = engine, sampling, system, images
        self.reading = reading
        self.clear()

    def clear(self) -> None:
        """Start again."""
        self.messages: list[dict[str, Any]] = (
            [{"role": "system", "content": self.system}] if self.system is not None else []
        )
        self.images = list(self.first)

    def turn(self, line: str) -> bool:
        """Execute a command or ask a question; return False at the end of the chat."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/clear":
            self.clear()
        elif command == "/image":
            self._add(rest.strip())
        elif command == "/help":
            warn(_HELP)
        elif command.startswith("/") and "/" not in command[1:]:
            raise UserError(f"unknown command {command!r}; /help lists the commands.")
        elif line:
            self._ask(line)
        return True

    def _add(self, name: str) -> None:
        name = name.strip("'\"")
        if not name or name == STDIN:
            raise UserError("/image needs a file or an http(s) URL, as in: /image street.jpg")
        self.images.append(read_named_image(name, self.reading))
        notice(f"image {len(self.images)} of the next question: {name}")

    def _ask(self, text: str) -> None:
        from ..engines.prompts import is_utf8
        from .asking import answer, remark

        if not is_utf8(text):
            raise UserError("the prompt is not UTF-8; convert it, or set the terminal to UTF-8.")

        messages = [*self.messages, {"role": "user", "content": question(text, self.images)}]
        answered = answer(self.engine, messages, self.sampling, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
        remark(answered, self.sampling)
        # A question that failed does not become part of the conversation.
        self.messages = [*messages, {"role": "assistant", "content": answered.text}]
        self.images = []
