# SPDX-License-Identifier: Apache-2.0
"""The name `tiny` means the embedded model to every verb and every loader, and nobody asks the hub for it."""

import importlib.util
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm import FastVLMForConditionalGeneration, checkpoints
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.checkpoints.embedded import resolve_model

IMAGES = Path(__file__).parents[2] / "examples" / "images"
NUMBER = "What number is written?"
# The packages of these are not in this environment: their own tests run them with `tiny`.
ELSEWHERE = {
    "bench": "tests/cli/test_bench.py",
    "serve": "tests/server/test_http_ending.py",
    "demo": "tests/demo/test_page_command.py",
    "eval": "tests/evaluation/test_harness_errors.py",
    "eval-encoder": "tests/evaluation/test_harness_encoder.py",
    "env": None,  # has no model
    "eval-report": None,  # reads results, no model
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a network, whose users' commands must not try to use it; in a directory of its own."""
    asked: list[Any] = []

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    yield
    assert asked == []


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """What verbs read beside the model: a folder of classes, a row of data, an adapter."""
    for name, colour in (("red", "#d02020"), ("blue", "#2020d0")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for shade in range(3):
            Image.new("RGB", (64 + shade, 64), colour).save(tmp_path / "classes" / name / f"{shade}.png")
    turns = [{"from": "human", "value": f"<image>\n{NUMBER}"}, {"from": "gpt", "value": "628"}]
    row = {"id": "a", "image": "sign.png", "conversations": turns}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    return {"classes": tmp_path / "classes", "rows": tmp_path / "train.json", "adapter": tmp_path / "adapter"}


def adapter_of_tiny(files: dict[str, Path]) -> None:
    from transformers_fastvlm.training import add_lora

    add_lora(FastVLMForConditionalGeneration.from_pretrained(tiny_checkpoint()), r=2).save_pretrained(files["adapter"])
    config = files["adapter"] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "tiny"}))


SIGN = str(IMAGES / "sign.png")
TRAIN = (
    *("train", "finetune", "model.path=tiny", "data.source=train.json", f"data.image_folder={IMAGES}"),
    *("output_dir=trained", "arguments.use_cpu=true", "--dry-run"),
)
VERBS: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    # verb: its words, a package that it needs, what it prints
    "generate": (("generate", SIGN, "-p", NUMBER, "-m", "tiny"), None, "628\n"),
    "generate --json": (("generate", SIGN, "-p", NUMBER, "-m", "tiny", "--json"), None, '"model": "tiny"'),
    "chat": (("chat", SIGN, "-m", "tiny"), None, "628\n"),
    "batch": (("batch", SIGN, "-o", "out.jsonl", "-p", NUMBER, "-m", "tiny"), None, ""),
    "embed": (("embed", SIGN, "-o", "vectors.npy", "-m", "tiny"), None, ""),
    "info": (("info", "tiny"), None, "model             tiny\n"),
    "convert": (("convert", "tiny", "converted", "--to", "transformers"), None, "from apple to transformers\n"),
    "export": (("export", "apple", "tiny", "exported"), None, "MB for apple"),
    "new": (("new", "made", "--vision", "tiny", "--language-model", "tiny", "--tokenizer", "tiny"), None, "made\n"),
    "merge": (("merge", "adapter", "merged"), "peft", "in apple layout\n"),
    "merge --base": (("merge", "adapter", "merged", "--base", "tiny"), "peft", "in apple layout\n"),
    "train": (TRAIN, "accelerate", ""),
    "data": (
        ("data", "check", "train.json", "--image-folder", str(IMAGES), "-m", "tiny"),
        None,
        "1 rows read, 1 valid",
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_verbs(name: str, run: Callable[..., Any], files: dict[str, Path], offline: None) -> None:
    words, package, printed = VERBS[name]
    if package is not None:
        pytest.importorskip(package, reason=f"fastvlm {name} needs {package}")
    if "adapter" in words:
        adapter_of_tiny(files)
    done = run(*words, stdin=f"{NUMBER}\n" if name == "chat" else "")
    assert printed in done.stdout
    assert "Apple's weights" not in done.stdout + done.stderr
    if name == "batch":
        assert json.loads(Path("out.jsonl").read_text())["answer"] == "628"


def test_every_verb_is_tried() -> None:
    from transformers_fastvlm.cli import app

    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert {name.split()[0] for name in VERBS} | set(ELSEWHERE) == names
    root = Path(__file__).parents[2]
    assert [name for name, file in ELSEWHERE.items() if file and '"tiny"' not in (root / file).read_text()] == []


def _engine(files: dict[str, Path]) -> Any:
    from transformers_fastvlm.engines import Sampling, load_engine

    content = [{"type": "image", "image": Image.open(SIGN)}, {"type": "text", "text": NUMBER}]
    engine = load_engine("transformers", "tiny", device="cpu")
    (answer,) = engine.generate([[{"role": "user", "content": content}]], Sampling(max_new_tokens=8))
    assert answer.text == "628"
    return engine.model


def _merged(files: dict[str, Path], **options: Any) -> Any:
    from transformers_fastvlm.training import load_merged

    adapter_of_tiny(files)
    return load_merged(files["adapter"], **options)


def _recipe(**model: Any) -> Any:
    from transformers_fastvlm.training import Recipe
    from transformers_fastvlm.training.recipe_loading import load_model

    return load_model(Recipe.from_dict({"model": model, "train": {"learning_rate": 1e-4}}))[0]


def _new(files: dict[str, Path]) -> Any:
    from transformers_fastvlm.training import new_model

    return new_model("tiny", "tiny")[0]


def _converted(files: dict[str, Path]) -> Any:
    assert checkpoints.detect_layout("tiny") == "apple"
    done = checkpoints.convert("tiny", "converted", "transformers")
    return FastVLMForConditionalGeneration.from_pretrained(done.directory)


def _exported(files: dict[str, Path]) -> Any:
    from transformers_fastvlm.export import export

    done = export("apple", "tiny", "exported")
    assert "the tiny model that comes with transformers-fastvlm" in (done.directory / "README.md").read_text()
    return FastVLMForConditionalGeneration.from_pretrained(done.directory)


def _encoder(files: dict[str, Path]) -> Any:
    from transformers_fastvlm.evaluation.encoder import load_encoder

    return load_encoder("tiny")[0]


def _measured(files: dict[str, Path]) -> Any:
    import torch

    from transformers_fastvlm.bench.cases import Options, cases
    from transformers_fastvlm.bench.subjects import build

    options = Options(models=("tiny",), against=("tiny",))
    case, other = cases(options)
    assert (case.label, case.resolution, other.kind) == ("tiny", 256, "other")
    for each in (case, other):
        build(each, options.as_dict())
    return torch


def _identity(files: dict[str, Path]) -> None:
    from transformers_fastvlm.checkpoints.checkpoint_identity import checkpoint_identity

    assert checkpoint_identity("tiny") == checkpoint_identity(str(tiny_checkpoint()))


LOADERS: dict[str, tuple[Callable[[dict[str, Path]], Any], str | None]] = {
    "load_engine": (_engine, None),
    "load_merged": (_merged, "peft"),
    "load_merged, base": (lambda files: _merged(files, base="tiny"), "peft"),
    "recipe, path": (lambda files: _recipe(path="tiny"), "accelerate"),
    "recipe, new": (lambda files: _recipe(new={"vision": "tiny", "language_model": "tiny"}), "accelerate"),
    "new_model": (_new, None),
    "convert": (_converted, None),
    "export": (_exported, None),
    "load_encoder": (_encoder, None),
    "benchmarks": (_measured, None),
    "identity of an evaluation": (_identity, None),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(name: str, files: dict[str, Path], offline: None) -> None:
    load, package = LOADERS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    model = load(files)
    if name not in ("benchmarks", "identity of an evaluation"):
        assert sum(parameter.numel() for parameter in model.parameters()) > 1_000_000


def test_a_directory_of_that_name_comes_first(
    offline: None, tmp_path: Path, fails: Callable[..., str], checkpoint: Callable[[str], Path]
) -> None:
    assert resolve_model("tiny") == str(tiny_checkpoint())
    assert resolve_model(Path("tiny")) == str(tiny_checkpoint())
    assert resolve_model("./tiny") == "./tiny" and resolve_model("apple/tiny") == "apple/tiny"
    (tmp_path / "tiny").mkdir()
    assert resolve_model("tiny") == "tiny"
    assert "'tiny' has no config.json" in fails("info", "tiny")
