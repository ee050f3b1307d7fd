# SPDX-License-Identifier: Apache-2.0
"""Recipes: those of the package say what the paper says, and mistakes in others are found before anything is loaded."""

from pathlib import Path

import pytest

from transformers_fastvlm.training import PARTS, Recipe, list_recipes, load_recipe

ALL = ["vision_tower", "projector", "language_model"]
PAPER = {  # conversation, learning rate, global batch, parts: arXiv 2412.13303
    "stage1": ("plain", 1e-3, 256, ["projector"]),
    "stage1.5": ("sft", 2e-5, 128, ALL),
    "stage2": ("sft", 2e-5, 128, ALL),
    "stage3": ("sft", 2e-5, 128, ALL),
}


@pytest.mark.parametrize("name", PAPER)
def test_stages_are_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    assert (
        recipe.data.conversation,
        recipe.train.learning_rate,
        recipe.train.global_batch_size,
        recipe.train.parts,
    ) == PAPER[name]
    arguments = recipe.arguments
    assert (arguments["lr_scheduler_type"], arguments["warmup_steps"], arguments["num_train_epochs"]) == (
        "cosine",
        0.03,
        1,
    )
    assert arguments["optim"] == "adamw_torch"
    assert recipe.data.questions == ("generic" if name == "stage1.5" else None)


def test_every_recipe_of_the_package_loads_and_says_what_it_is_for() -> None:
    names = list_recipes()
    assert {*PAPER, "finetune", "lora", "qlora"} <= set(names)
    for name, description in names.items():
        recipe = load_recipe(name)
        assert recipe.name == name and description == recipe.description != ""
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    recipe = load_recipe("lora", ["output_dir=out", "data.source=[a.json, b.json]", "arguments.max_steps=3"])
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.learning_rate=1e-3", lambda recipe: recipe.train.learning_rate == 0.001),  # YAML 1.1 reads a word
        ("train.learning_rate={projector: 2E-4}", lambda recipe: recipe.learning_rates() == {"projector": 2e-4}),
        ("train.global_batch_size=null", lambda recipe: recipe.train.global_batch_size is None),
        ("arguments.max_steps=10", lambda recipe: recipe.arguments["max_steps"] == 10),
        ("data.options.limit=5", lambda recipe: recipe.data.options == {"limit": 5}),
        ("data.source=a=b.json", lambda recipe: recipe.data.source == "a=b.json"),
        ("model.drop_path_rate=0", lambda recipe: recipe.model.drop_path_rate == 0.0),
        ("lora.r=8", lambda recipe: recipe.lora.r == 8),
    ],
)
def test_overrides_are_typed_by_yaml(override: str, read) -> None:
    parts = ["train.learning_rate={language_model: 1e-4, projector: 1e-3}"] if override.startswith("lora") else []
    assert read(load_recipe("stage1", [*parts, override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.parts=[projector]", r"The recipe has no key 'trian'; did you mean 'train'\? Its keys are name,"),
        ("train.part=[projector]", r"train has no key 'part'; did you mean 'parts'\? Its keys are parts,"),
        ("arguments.max_step=3", r"arguments has no key 'max_step'; did you mean 'max_steps'\?"),
        ("train.learning_rate={head: 1}", r"train.learning_rate has no key 'head'\. Its keys are vision_tower"),
        ("train.parts=[head]", "train.parts has 'head'; expected some of vision_tower"),
        ("train.parts=projector", "train.parts is 'projector'; expected a list"),
        ("train.parts=[]", "train.parts is empty and there is no lora section"),
        ("data.conversation=chat", "data.conversation is 'chat'; expected one of plain, sft"),
        ("train.global_batch_size=many", "train.global_batch_size is 'many'; expected a whole number or null"),
        ("train.global_batch_size=true", "train.global_batch_size is True; expected a whole number or null"),
        ("train.learning_rate=0", "train.learning_rate is 0; expected a positive number"),
        ("train.learning_rate=null", "train.learning_rate is None; expected a positive number"),
        ("train.learning_rate={vision_tower: 1}", "train.learning_rate has no rate for projector, which is trained"),
        ("train.learning_rate.projector=1", r"train.learning_rate is 0.001, which cannot have 'projector'"),
        ("arguments.learning_rate=1", r"arguments.learning_rate is set by train.learning_rate"),
        ("arguments.gradient_accumulation_steps=2", "train.global_batch_size and arguments.gradient_accumulation"),
        ("data.questions=generic", "data.questions needs data.conversation: sft"),
        ("model.image_size=100", "model.image_size is 100; expected a positive multiple of 64"),
        ("model.drop_path_rate=1", "model.drop_path_rate is 1.0; expected a number of at least 0 and below 1"),
        ("data.streaming=true", r"data.streaming has no known length: set arguments.max_steps"),
        ("model=small", "model is 'small'; expected a section"),
        ("data.streaming", "'data.streaming' is not a recipe override; expected key=value"),
        ("data.options={", r"The value in 'data.options=\{' is not YAML"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("stage1", [override])


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"data.group needs all rows at once, but data.streaming reads them one"):
        load_recipe("finetune", ["data.streaming=true", "arguments.max_steps=3"])
    with pytest.raises(ValueError, match=r"train.precision is float16 and model.dtype bfloat16"):
        load_recipe("finetune", ["train.precision=float16", "model.dtype=bfloat16"])


def test_a_model_is_loaded_or_made() -> None:
    with pytest.raises(ValueError, match=r"model.path and model.new are both set.*model.new=null"):
        load_recipe("stage1", ["model.path=a", "model.new={vision: b}"])


def test_unknown_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe 'stage4'; did you mean 'stage.*The package has"):
        load_recipe("stage4")
    with pytest.raises(FileNotFoundError, match=r"mine.yaml does not exist; expected a recipe"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "holds a list"), ("a", "holds a str")])
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(file)


def test_parts_have_one_spelling() -> None:
    assert list(PARTS) == ALL
