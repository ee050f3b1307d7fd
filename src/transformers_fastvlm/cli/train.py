# SPDX-License-Identifier: Apache-2.0
"""`fastvlm train`: one training run, from a recipe."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .cli_errors import FAILURE, UserError, notice, reports_errors, warn
from .progress_bars import reading_bar

if TYPE_CHECKING:
    from ..training import Recipe

__all__ = ["train"]


@reports_errors
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A built-in recipe (see --list), or a YAML file."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to the recipe, such as data.source=train.json or arguments.max_steps=100.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint in output_dir.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and a memory estimate, then exit.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with its changes, then exit.")] = False,
    list_them: Annotated[bool, typer.Option("--list", help="List the built-in recipes, then exit.")] = False,
    launch_config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Print the path of a config file for accelerate launch (ddp, fsdp2, zero2, zero3), then exit.",
        ),
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train or fine-tune a model with a recipe.

    The trained model is saved in output_dir and loads like any other: fastvlm generate -m OUT. On several GPUs:
    accelerate launch -m transformers_fastvlm train RECIPE …

    Examples:

        fastvlm train finetune data.source=train.json output_dir=OUT

        fastvlm train lora data.source=train.json output_dir=OUT --dry-run
    """
    from ..training import launch_config as file_of
    from ..training import list_recipes, load_recipe

    if launch_config is not None:
        typer.echo(str(file_of(launch_config)))
        return
    if list_them:
        for name, description in list_recipes().items():
            typer.echo(f"{name:<14}{description}")
        return
    if recipe is None:
        raise UserError("no recipe: give one of `fastvlm train --list`, or a YAML file.")
    loaded = load_recipe(recipe, changes or ())
    if show:
        typer.echo(loaded.to_yaml(), nl=False)
        return
    from transformers.utils import logging

    from ..training import run

    is_main = os.environ.get("RANK", "0") == "0"
    for line in _licences(loaded):
        if is_main:
            notice(line)
    logging.disable_progress_bar()  # of reading and writing files; the training's progress bar stays
    # Only the result goes to standard output.
    with contextlib.redirect_stdout(sys.stderr), _advises(debug), reading_bar(shown=is_main) as reading:
        # The plan is the result of a dry run, so --quiet does not hide it.
        report = warn if dry_run else None if quiet else notice
        out = run(loaded, resume=resume, dry_run=dry_run, report=report, reading=reading)
    if is_main and not dry_run:
        typer.echo(str(out))


def _licences(recipe: "Recipe") -> Iterator[str]:
    """Yield the licence notices of the weights that a recipe starts from."""
    from .model_sources import check_loadable, licence_notice, read_config

    new = recipe.model.new or {}
    named = (recipe.model.path, new.get("vision"), new.get("language_model"))
    said: set[str] = set()
    for source in (name for name in named if isinstance(name, str)):
        config = read_config(source)
        if source == recipe.model.path:
            check_loadable(source, config)
        if (line := licence_notice(source, config)) and line not in said:
            said.add(line)
            yield line


@contextlib.contextmanager
def _advises(debug: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        warn(
            "fastvlm: out of memory. Set a smaller arguments.per_device_train_batch_size (train.global_batch_size may "
            "stay), train.gradient_checkpointing=true, a smaller model.image_size or data.max_length, or use the "
            "recipe lora; --dry-run prints an estimate."
        )
        raise typer.Exit(FAILURE) from error
