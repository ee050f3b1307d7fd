# SPDX-License-Identifier: Apache-2.0
"""`fastvlm new`: build a model from an encoder and a language model, ready for stage 1."""

from typing import Annotated, Any

import typer

from . import options
from .cli_errors import notice, reports_errors

__all__ = ["new"]


@reports_errors
def new(
    out: options.OutDirectory,
    vision: Annotated[
        str,
        typer.Option(help="Directory or hub repository of a FastViTHD or a FastVLM, merged or train-time; or tiny."),
    ],
    language_model: Annotated[
        str,
        typer.Option(
            help="Directory or hub repository of a Qwen2, Qwen2.5, Qwen3 or Llama model, or of a FastVLM; or tiny."
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Directory or hub repository of a tokenizer, or tiny. Default: the language model's."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=64, help="Height and width of images in pixels, a multiple of 64.")
    ] = None,
    dtype: Annotated[options.DtypeName, typer.Option(help="dtype of the weights; auto is float32.")] = (
        options.DtypeName.auto
    ),
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the projector's weights.")] = 0,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Build a model from a FastViTHD and a language model, with an untrained projector.

    The result includes a processor and is ready for `fastvlm train stage1`.

    Examples:

        fastvlm new OUT --vision tiny --language-model tiny

        fastvlm new OUT --vision tiny --language-model Qwen/Qwen3-0.6B
    """
    from ..storage.atomic_files import require_new
    from ..training import describe_parts, new_model, save_model
    from .model_sources import licence_notice, read_config

    require_new(out)
    name = "float32" if dtype is options.DtypeName.auto else dtype.value
    for source in dict.fromkeys((vision, language_model)):
        if line := licence_notice(source, read_config(source)):
            notice(line)
    model, processor = new_model(vision, language_model, tokenizer, image_size=size, dtype=name, seed=seed)
    save_model(model, processor, out)
    for part, (number, _) in describe_parts(model).items():
        notice(f"{part:<15}{number:>15,} parameters")
    config: Any = model.config
    side, text = config.vision_config.image_size, config.text_config
    notice(f"{text.model_type}, {side}x{side} pixels, <image> is {processor.image_token_id}")
    typer.echo(str(out))
