# SPDX-License-Identifier: Apache-2.0
"""Recipes: training runs described by YAML files, which are checked before anything is loaded."""

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from .parts import PARTS
from .recipe_fields import build, check_keys, did_you_mean

__all__ = [
    "DataSection",
    "ExportSection",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "TrainSection",
    "list_recipes",
    "load_recipe",
]

DERIVED_ARGUMENTS = {
    "output_dir": "output_dir",
    "learning_rate": "train.learning_rate",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "remove_unused_columns": "nothing: rows reach the collator whole",
}
"""Arguments of `TrainingArguments` that a recipe does not set directly, and what sets them."""


@dataclass
class ModelSection:
    """The model to train: exactly one of `path` and `new`.

    Attributes:
        path: directory or hub repository of a FastVLM, or "tiny".
        new: arguments of `new_model`: `vision`, `language_model`, `tokenizer` and so on.
        dtype: dtype of the weights during training; "float32" wherever memory allows.
        image_size: height and width in pixels, a multiple of 64; None for the model's.
        freeze_batch_norm: whether BatchNorm uses its running statistics without updating them; None for yes in the
            merged form of the encoder and no in its train-time form.
        drop_path_rate: stochastic depth of the encoder, in [0, 1); None for the model's.
        merge_encoder: whether to merge the branches of a train-time encoder before training.
    """

    path: str | None = None
    new: dict[str, Any] | None = None
    dtype: str = "float32"
    image_size: int | None = None
    freeze_batch_norm: bool | None = None
    drop_path_rate: float | None = None
    merge_encoder: bool = False


@dataclass
class DataSection:
    """The training and evaluation data.

    Attributes:
        source: a LLaVA file (.json, .jsonl), a data set on the hub or in a directory, "scenes", or a list of these,
            which are concatenated and shuffled together.
        options: further arguments of `data.load`, or of `SceneDataset`.
        image_folder: folder of the images of a LLaVA file.
        eval_source, eval_options: the same for evaluation; None for no evaluation.
        conversation: "plain" (image, caption, newline: stage 1) or "sft" (answers are supervised).
        questions: questions for captions in an "sft" conversation: "generic" for the package's list, or a text file
            with one question per line. Each row's question is drawn by its id and caption, and the image comes before
            or after it with equal probability.
        max_length: maximum tokens of a row, image tokens included; None for no limit.
        on_bad_image: "error", or "skip", which leaves the row out and counts it.
        do_exif_transpose: apply the EXIF orientation of images; false keeps the pixels as stored.
        alpha_background: background colour for transparent images, or "none" to drop their transparency.
        max_pixels: maximum pixels of an image; None for Pillow's limit.
        streaming: read the source while training; needs `arguments.max_steps`.
        group: make batches of rows of similar length and kind, to reduce padding.
    """

    source: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    image_folder: str | None = None
    eval_source: Any = None
    eval_options: dict[str, Any] = field(default_factory=dict)
    conversation: Literal["plain", "sft"] = "sft"
    questions: str | None = None
    max_length: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    do_exif_transpose: bool = True
    alpha_background: str = "white"
    max_pixels: int | None = None
    streaming: bool = False
    group: bool = False


@dataclass
class TrainSection:
    """The trained parts and the optimization.

    Attributes:
        parts: some of vision_tower, projector and language_model.
        learning_rate: one for all parts, or one for each part by name.
        global_batch_size: rows per update, over all devices, reached by gradient accumulation; None for
            `arguments.gradient_accumulation_steps`.
        precision: compute dtype: "float32", "bfloat16" or "float16" (autocast), or "auto" for bfloat16 where the device
            supports it.
        gradient_checkpointing: recompute activations instead of keeping them.
        sample_answers: number of rows of the evaluation set that are answered and recorded at each evaluation.
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    learning_rate: Any = None
    global_batch_size: int | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    sample_answers: int = 4


@dataclass
class LoraSection:
    """Low-rank adapters, instead of full training of parts or in addition to it.

    Attributes:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: dropout probability of the adapters' input, in [0, 1).
        parts: parts that get adapters. The parts in `train.parts` are fully trained as well.
        targets: names of the layers that get adapters, or None for the default layers of each part.
        quantization: None, or "4bit" or "8bit" to quantize the language model (QLoRA; needs bitsandbytes).
    """

    r: int = 64
    alpha: float = 128
    dropout: float = 0.05
    parts: list[str] = field(default_factory=lambda: ["language_model"])
    targets: Any = None
    quantization: str | None = None


@dataclass
class ExportSection:
    """The form of the finished model.

    Attributes:
        merge_encoder: merge the branches of a train-time encoder, as in published models; False if a later stage trains
            the train-time form. Checkpoints keep the form that is trained.
        merge_lora: merge adapters into the weights; False saves an adapter.
        dtype: dtype of the weights; None for the dtype of training.
    """

    merge_encoder: bool = True
    merge_lora: bool = True
    dtype: str | None = None


@dataclass
class Recipe:
    """A training run.

    Attributes:
        name: name of the recipe.
        description: purpose of the recipe.
        output_dir: directory for checkpoints, logs and the finished model.
        model, data, train, lora, export: see the sections.
        arguments: further arguments of `transformers.TrainingArguments`, passed on unchanged.
    """

    name: str = "recipe"
    description: str = ""
    output_dir: str | None = None
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    lora: LoraSection | None = None
    export: ExportSection = field(default_factory=ExportSection)
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Recipe":
        """Build and check a recipe from nested dictionaries.

        Raises:
            ValueError: a key is unknown, a value has the wrong type, or values contradict each other.
        """
        recipe: Recipe = build(cls, content)
        recipe.check()
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries, from which `from_dict` makes an equal recipe."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each trained part, adapters included."""
        given = self.train.learning_rate
        learning = [
            part for part in PARTS if part in self.train.parts or (self.lora is not None and part in self.lora.parts)
        ]
        if isinstance(given, Mapping):
            return {part: float(given[part]) for part in learning}
        return {part: float(given) for part in learning}

    def check(self) -> None:
        """Check the recipe, without loading anything.

        Raises:
            ValueError: values contradict each other or are out of range.
        """
        from transformers import TrainingArguments

        known = [entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init]
        check_keys(self.arguments, known, "arguments")
        for name in self.arguments:
            if name in DERIVED_ARGUMENTS:
                raise ValueError(f"arguments.{name} is set by {DERIVED_ARGUMENTS[name]}; set that instead.")
        if self.model.path is not None and self.model.new is not None:
            raise ValueError(
                "model.path and model.new are both set: the first loads a model, the second creates one. Set one of "
                "them to null, as in model.new=null."
            )
        for where, parts in (("train.parts", self.train.parts), ("lora.parts", self.lora.parts if self.lora else [])):
            if unknown := [part for part in parts if part not in PARTS]:
                raise ValueError(f"{where} has {unknown[0]!r}; expected some of {', '.join(PARTS)}.")
        if not self.train.parts and self.lora is None:
            raise ValueError("train.parts is empty and there is no lora section, so nothing would be trained.")
        if self.lora is not None and self.model.new is not None:
            raise ValueError(
                "model.new and lora are both set: adapters need a saved base model. Create the model once (fastvlm "
                "new), and name its directory as model.path."
            )
        self._check_rates()
        if self.train.global_batch_size is not None and "gradient_accumulation_steps" in self.arguments:
            raise ValueError(
                "train.global_batch_size and arguments.gradient_accumulation_steps are both set; the second follows "
                "from the first. Set one of them to null."
            )
        self._check_data()
        size, rate = self.model.image_size, self.model.drop_path_rate
        if size is not None and (size < 64 or size % 64):
            raise ValueError(f"model.image_size is {size}; expected a positive multiple of 64.")
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"model.drop_path_rate is {rate}; expected a number of at least 0 and below 1.")
        if self.train.precision == "float16" and self.model.dtype != "float32":
            raise ValueError(
                f"train.precision is float16 and model.dtype {self.model.dtype}: float16 scales the loss, which needs "
                "weights in float32. Set model.dtype=float32."
            )

    def _check_data(self) -> None:
        if self.data.questions is not None and self.data.conversation != "sft":
            raise ValueError("data.questions needs data.conversation: sft.")
        if self.data.streaming and self.data.group:
            raise ValueError("data.group needs all rows at once, but data.streaming reads them one by one. Keep one.")
        if self.data.streaming and self.arguments.get("max_steps", -1) < 1:
            raise ValueError("data.streaming has no known length: set arguments.max_steps, the number of updates.")

    def _check_rates(self) -> None:
        given = self.train.learning_rate
        if isinstance(given, Mapping):
            check_keys(given, PARTS, "train.learning_rate")
            lora_parts = self.lora.parts if self.lora is not None else []
            if missing := [part for part in (*self.train.parts, *lora_parts) if part not in given]:
                raise ValueError(f"train.learning_rate has no rate for {missing[0]}, which is trained; add one.")
        values = list(given.values()) if isinstance(given, Mapping) else [given]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(
                    f"train.learning_rate is {given!r}; expected a positive number, or one for each trained part."
                )


def list_recipes() -> dict[str, str]:
    """Return the description of each recipe in the package, by name."""
    folder = resources.files(__package__).joinpath("recipes")
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    found = {name.removesuffix(".yaml"): _parse(folder.joinpath(name).read_text("utf-8"), name) for name in files}
    return {name: str(content.get("description", "")) for name, content in found.items()}


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: name of a recipe in the package (`list_recipes`), or a YAML file.
        overrides: changes such as `"data.source=train.json"` or `"train.learning_rate.projector=1e-3"`; the value is
            read as YAML.

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: the file is not YAML, a key is unknown, or a value is invalid.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a recipe (a YAML file).")
        content = _parse(path.read_text("utf-8"), str(path))
    else:
        names = list_recipes()
        if name not in names:
            raise FileNotFoundError(
                f"There is no recipe {name!r}{did_you_mean(name, names)} The package has {', '.join(names)}; the name "
                "of a recipe file ends in .yaml."
            )
        content = _parse(resources.files(__package__).joinpath("recipes", f"{name}.yaml").read_text("utf-8"), name)
    content.setdefault("name", path.stem if path.suffix in (".yaml", ".yml") else path.name)
    for override in overrides:
        _apply(content, override)
    return Recipe.from_dict(content)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2; PyYAML follows YAML 1.1, where it is a string."""


_Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        content = _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}; expected a recipe, with sections by name.")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"{override!r} is not a recipe override; expected key=value, such as data.source=train.json.")
    try:
        value = _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The value in {override!r} is not YAML: {' '.join(str(error).split())}.") from error
    *parents, last = key.split(".")
    here: Any = content
    for depth, name in enumerate(parents):
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise ValueError(f"{'.'.join(parents[: depth + 1])} is {here!r}, which cannot have {last!r} ({override}).")
    here[last] = value
