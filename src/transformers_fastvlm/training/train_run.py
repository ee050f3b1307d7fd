# SPDX-License-Identifier: Apache-2.0
"""A training run, from a recipe to a directory with the finished model."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..random_streams import kept_random_streams
from ..storage.atomic_files import write_lines
from .arguments import training_arguments
from .callbacks import LinesAboveBar, LogLines, SampleAnswers
from .ending import ending
from .exporting import export, is_finished
from .parts import set_trainable
from .recipe_loading import load_data, load_model, prepare_encoder
from .recipes import Recipe, load_recipe
from .summary import summary
from .trainer import FastVLMTrainer, last_checkpoint

__all__ = ["RECIPE_FILE", "run"]

logger = logging.getLogger(__name__)

RECIPE_FILE, ROWS_FILE = "recipe.yaml", "rows.json"


@kept_random_streams()
def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    dry_run: bool = False,
    report: Callable[[str], None] | None = None,
    reading: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Train a model with a recipe.

    The directory `recipe.output_dir` gets the recipe, checkpoints (`checkpoint-N`) during training, answers to a few
    rows at each evaluation (`samples.jsonl`), and at the end the model and its processor, which the Auto classes load.
    With several processes, started by `accelerate launch` or `torchrun`, each calls this function.

    Args:
        recipe: see `load_recipe`.
        resume: resume from the newest checkpoint, or start if there is none; a finished run with the same recipe
            is not changed.
        dry_run: stop before the first step; nothing is written.
        report: called with the summary and the progress, line by line, on the main process. Without it there is no
            progress bar, the memory estimate, which takes some seconds, is skipped, and changes since an interrupted
            run started are logged as warnings.
        reading: called with the bytes read so far and in all, while the files of a data set are read to notice changes
            when the run is resumed.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory already holds a run, and `resume` is False.
        ImportError: a package that training needs is missing.
        OSError: a file is missing or cannot be written.
        ValueError: the recipe or a row of the data is invalid.
    """
    recipe.check()
    if recipe.output_dir is None:
        raise ValueError("output_dir is not set: name the directory for the result, as in output_dir=my-model.")
    out = Path(recipe.output_dir).expanduser()
    checkpoint = _checkpoint_to_resume(out, resume)
    arguments = training_arguments(recipe)
    tell = _silent if report is None or arguments.process_index > 0 else report
    changes = _changes(out, recipe) if resume else []
    if resume and is_finished(out) and not changes:
        tell(f"{out} is already finished.")
        return out

    set_seed(arguments.seed)  # adapters are initialized randomly, before Trainer sets the seed
    model, processor = load_model(recipe)
    prepare_encoder(model, recipe)
    if recipe.lora is None:
        set_trainable(model, recipe.train.parts)
    else:
        from .lora import add_lora

        section = recipe.lora
        model = add_lora(
            model,
            r=section.r,
            alpha=section.alpha,
            dropout=section.dropout,
            parts=section.parts,
            targets=section.targets,
            whole=recipe.train.parts,
        )
    train, evaluation, collator = load_data(recipe.data, processor)
    if tell is not _silent:
        for line in summary(recipe, arguments, model, train, evaluation, collator):
            tell(line)
    rows = {}
    if resume or not dry_run:
        rows = {"data.source": _rows_of(train, reading), "data.eval_source": _rows_of(evaluation, reading)}
    changes += _changed_rows(out, rows) if resume else []
    warn = logger.warning if report is None and arguments.process_index == 0 else tell
    for line in changes:
        warn(f"changed since the run started: {line}")
    if checkpoint is not None:
        tell(f"resuming from {checkpoint}")
    if dry_run:
        return out
    if arguments.should_save:
        out.mkdir(parents=True, exist_ok=True)
        write_lines(out / RECIPE_FILE, [recipe.to_yaml().rstrip("\n")])
        write_lines(out / ROWS_FILE, [json.dumps(rows, indent=2)])
    trainer = FastVLMTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        learning_rates=recipe.learning_rates(),
        group=recipe.data.group,
    )
    _add_callbacks(trainer, recipe, tell)
    started, first = time.monotonic(), 0
    if checkpoint is None or not _is_last(checkpoint, arguments):
        first = 0 if checkpoint is None else _state(checkpoint)["global_step"]
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        checkpoint = None
    seconds = time.monotonic() - started
    export(trainer, recipe, out, checkpoint)
    for line in ending(out, trainer.state.log_history, seconds, trainer.state.global_step - first, train):
        tell(line)
    return out


def _silent(line: str) -> None:
    pass


def _add_callbacks(trainer: FastVLMTrainer, recipe: Recipe, tell: Callable[[str], None]) -> None:
    # The progress bar is only for terminals; lines also go to logs.
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None and tell is not _silent and sys.stderr.isatty():
        bar = LinesAboveBar(tell)
        trainer.add_callback(bar)
        tell = bar.report
    trainer.add_callback(LogLines(tell))
    if trainer.eval_dataset is not None and recipe.train.sample_answers:
        answers = SampleAnswers(
            trainer.processing_class,
            trainer.eval_dataset,
            conversation=recipe.data.conversation,
            rows=recipe.train.sample_answers,
            report=tell,
        )
        answers.attach(trainer)


def _checkpoint_to_resume(out: Path, resume: bool) -> Path | None:
    if not out.exists():
        return None
    if not out.is_dir():
        raise FileExistsError(f"output_dir {out} is a file; expected a directory, or a path that does not exist.")
    found = last_checkpoint(out)
    if resume:
        return found
    if found is not None or is_finished(out):
        what = found.name if found is not None else "a model"
        raise FileExistsError(
            f"output_dir {out} already holds {what}, which is not overwritten. Resume it (--resume), or choose another "
            "directory."
        )
    return None


def _changes(out: Path, recipe: Recipe) -> list[str]:
    """Return the changes to the recipe since the run in `out` started."""
    if not (out / RECIPE_FILE).is_file():
        return []
    before, now = load_recipe(out / RECIPE_FILE).to_dict(), recipe.to_dict()
    return [
        f"{key} was {old!r}, is {new!r}"
        for key, (old, new) in _flat_pairs(before, now).items()
        if old != new and key not in ("name", "description", "output_dir")
    ]


def _rows_of(dataset: Any, reading: Callable[[int, int], None]) -> dict[str, Any] | None:
    """Return the number of samples and a digest of their rows; None for a stream, or where there are none."""
    if not hasattr(dataset, "__len__"):
        return None
    digest = getattr(getattr(dataset, "captions", dataset), "digest", None)
    return {"rows": len(dataset), "digest": None if digest is None else digest(reading)}


def _changed_rows(out: Path, rows: dict[str, Any]) -> list[str]:
    """Return the changes to the rows since the run in `out` started."""
    try:
        before = json.loads((out / ROWS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # the run never started, or an earlier version wrote it
    lines = []
    for key, now in rows.items():
        was = before.get(key) if isinstance(before, dict) else None
        if was is None or now is None or was == now:
            continue
        how = f"{was['rows']:,} rows, has {now['rows']:,}" if was["rows"] != now["rows"] else "other rows"
        lines.append(f"{key} had {how}; the remaining steps use the new rows in their order")
    return lines


def _flat_pairs(first: Any, second: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if not isinstance(first, dict) or not isinstance(second, dict):
        return {key: (first, second)}
    pairs: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*first, *second]):
        pairs |= _flat_pairs(first.get(name), second.get(name), f"{key}.{name}" if key else name)
    return pairs


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def _is_last(checkpoint: Path, arguments: TrainingArguments) -> bool:
    """Return whether a checkpoint is of the last step; from it `Trainer` would train one step more."""
    state = _state(checkpoint)
    if arguments.max_steps > 0:
        return bool(state["global_step"] >= arguments.max_steps)
    return bool(state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= arguments.num_train_epochs)
