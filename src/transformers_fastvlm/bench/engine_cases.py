# SPDX-License-Identifier: Apache-2.0
"""The engines to measure, and how each is loaded."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..engines import ENGINES, engine_class
from .cases import LEAST, check_at_least, check_image

__all__ = ["EngineCase", "EngineOptions", "engine_cases"]

_FORM = "ENGINE, ENGINE:PRECISION or ENGINE:PRECISION=DIRECTORY"


@dataclass(frozen=True)
class EngineCase:
    """An engine with a model in one precision, measured in a separate process.

    Attributes:
        engine: one of `transformers_fastvlm.engines.ENGINES`.
        model: see `load_engine`.
        precision: of an export, or the dtype of an engine that loads checkpoints; None for the engine's choice.
        device: see the engine; "auto" for its choice.
    """

    engine: str
    model: str
    precision: str | None = None
    device: str = "auto"

    @property
    def name(self) -> str:
        """Name in messages; unique in a run."""
        return " ".join(filter(None, (self.engine, self.precision, self.model)))

    @property
    def reads_exports(self) -> bool:
        """Whether the engine reads the directory of an export, which has precisions, instead of a checkpoint."""
        made: Any = engine_class(self.engine).__init__
        return "precision" in made.__annotations__

    def load_options(self) -> dict[str, Any]:
        """Return the options of `load_engine`."""
        options = {"precision" if self.reads_exports else "dtype": self.precision}
        if self.device != "auto":
            options["device"] = self.device
        return {name: value for name, value in options.items() if value is not None}

    def command(self) -> str:
        """Return the command that answers with this engine."""
        words = ["fastvlm generate IMAGE -p QUESTION -m", self.model, "--engine", self.engine]
        words += [word for name, value in self.load_options().items() for word in (f"--{name}", value)]
        return " ".join(words)


@dataclass(frozen=True)
class EngineOptions:
    """Options of `run_engines`; see `fastvlm bench --help`.

    Raises:
        ValueError: a value is invalid; the message says what was expected.
    """

    cases: tuple[EngineCase, ...]
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    warmup: int = 1
    repetitions: int = 5
    new_tokens: int = 16
    image: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("no engine is named; name at least one.")
        names = [case.name for case in self.cases]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the engine {name} is named twice; name it once.")
        for name, low in (*LEAST.items(), ("new_tokens", 2)):  # a rate needs a second token
            check_at_least(name, getattr(self, name), low)
        check_image(self.image)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self)


def engine_cases(named: Sequence[str], model: str | None, device: str = "auto") -> tuple[EngineCase, ...]:
    """Return the engines of a command line.

    Args:
        named: each as ENGINE, ENGINE:PRECISION or ENGINE:PRECISION=DIRECTORY.
        model: model of the engines without a directory; None if none is given.
        device: device of the engines that have a choice.

    Raises:
        ValueError: an engine is unknown, or has nothing to load.
    """
    return tuple(_case(text, model, device) for text in named)


def _case(text: str, model: str | None, device: str) -> EngineCase:
    head, _, directory = text.partition("=")
    engine, _, precision = head.partition(":")
    if engine not in ENGINES:
        raise ValueError(f"--engine has {text!r}; expected {_FORM}, where ENGINE is one of {', '.join(ENGINES)}.")
    case = EngineCase(engine, directory or model or "", precision or None, device)
    if not case.model:
        raise ValueError(f"--engine has {text!r}, but no MODEL is given; add one, or write {head}=DIRECTORY.")
    if case.reads_exports and not os.path.isdir(case.model):
        raise ValueError(
            f"--engine has {text!r}, but {engine} needs the directory of an export, and {case.model!r} is not one. "
            f"Run fastvlm export, and write {head}=DIRECTORY."
        )
    return case
