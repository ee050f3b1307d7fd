# SPDX-License-Identifier: Apache-2.0
"""The encoder's judge: classifiers against optima and counts worked out by hand, folders, and whole runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from transformers_fastvlm import FastViTHDConfig, FastViTHDModel
from transformers_fastvlm.cli import app
from transformers_fastvlm.evaluation.classifiers import (
    fit_probe,
    nearest_neighbours,
    read_text_embeddings,
    zero_shot,
)
from transformers_fastvlm.evaluation.encoder import encode, judge_encoder, load_encoder
from transformers_fastvlm.evaluation.labelled_images import read_class_folders, read_labelled_images, split

pytest.importorskip("sklearn", reason="the classifiers are scikit-learn's, which the extra eval brings")

COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 20, 30)}


def clusters(rows: int, classes: int, features: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    return centres[labels] + noise * torch.randn(rows, features, generator=generator), labels


def newton(features: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, float]:
    """Return the optimum of the probe's objective by Newton's method in float64, another way to the same point."""
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    mask = torch.ones(x.shape[1], classes, dtype=x.dtype)
    mask[-1] = 0

    def objective(flat: Tensor) -> Tensor:
        weights = flat.reshape(x.shape[1], classes)
        return F.cross_entropy(x @ weights, labels) + strength / 2 * (mask * weights).square().sum()

    flat = torch.zeros(mask.numel(), dtype=x.dtype)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(objective, flat)
        hessian = torch.autograd.functional.hessian(objective, flat)
        # All biases may move together without changing anything: the smallest step of all is taken.
        flat = flat - torch.linalg.pinv(hessian, hermitian=True) @ gradient
    return flat.reshape(x.shape[1], classes), float(objective(flat))


def fitted(features: Tensor, labels: Tensor, strength: float) -> Any:
    return fit_probe(features, labels.tolist(), (strength,), ())[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_probe_is_at_the_optimum(strength: float, dtype: torch.dtype) -> None:
    features, labels = clusters(60, 3, 4, 1.5)
    probe = fitted(features.to(dtype), labels, strength)["regression"]
    weights, _ = newton(features, labels, 3, strength)
    assert torch.allclose(torch.as_tensor(probe.coef_).double().T, weights[:-1], atol=2e-3)
    bias = torch.as_tensor(probe.intercept_).double()
    assert torch.allclose(bias - bias.mean(), weights[-1] - weights[-1].mean(), atol=2e-3)


def test_scale_and_constant_features_do_not_matter() -> None:
    features, labels = clusters(60, 3, 4, 1.0)
    other = torch.cat([1000 * features + 5, torch.full((60, 1), 7.0)], 1)
    one, two = (fitted(rows, labels, 0.1)["regression"].coef_ for rows in (features, other))
    assert np.allclose(one, two[:, :-1], atol=1e-3) and np.abs(two[:, -1]).max() == 0
    with pytest.raises(ValueError, match="NaN or infinity"):
        fitted(features.fill_(float("inf")), labels, 0.1)


def test_regularisation_is_the_best_on_what_is_held_out() -> None:
    features, labels = clusters(60, 3, 40, 4.0, seed=1)
    checks, truths = clusters(300, 3, 40, 4.0, seed=2)
    strengths = (1e5, 1.0, 1e-2, 1e-5)
    rows, classes, held_out = torch.cat([features, checks]), [*labels.tolist(), *truths.tolist()], [False] * 60
    probe, best, tried = fit_probe(rows, classes, strengths, held_out + [True] * 300)
    # The strength is by the rows of both, so on the 60 it is six times as large.
    expected = {
        strength: float((fitted(features, labels, 6 * strength).predict(checks.numpy()) == truths.numpy()).mean())
        for strength in strengths
    }
    assert tried == pytest.approx(expected, abs=0.011)  # 3 of 300: two ways to nearly the same optimum
    assert tried[best] == max(tried.values()) and tried[best] > tried[1e-5]
    assert (probe.predict(rows.numpy()) == classes).mean() > tried[best]  # fitted to all of them
    # All alike: the strongest.
    easy, labels = clusters(30, 3, 5, 0.01)
    assert fit_probe(easy, labels.tolist(), (0.01, 0.001), [False] * 15 + [True] * 15)[1] == 0.01


def test_neighbours_by_hand() -> None:
    # Angles in degrees; one neighbour of class 0 at 0, two of class 1 at 30.
    angles = torch.tensor([0.0, 30.0, 31.0, 180.0]).deg2rad()
    rows = 5 * torch.stack([angles.cos(), angles.sin()], 1)
    labels = [0, 1, 1, 2]
    queries = torch.tensor([[1.0, 0.1], [1.0, 0.3], [-1.0, 0.0]])
    assert nearest_neighbours(rows, labels, queries, 1).tolist() == [0, 1, 2]
    # At 5.7 degrees: similarities 0.995 against 0.911 and 0.903: e^(0.995/0.07) = 1.49e6 against
    # e^(0.911/0.07) + e^(0.903/0.07) = 4.5e5 + 4.0e5: the nearer one outvotes two; at 12 degrees it does not.
    near, far = torch.tensor([5.7, 12.0]).deg2rad()
    queries = torch.tensor([[near.cos(), near.sin()], [far.cos(), far.sin()]])
    assert nearest_neighbours(rows, labels, queries, 3).tolist() == [0, 1]
    with pytest.raises(ValueError, match="k is 5; expected 1 to 4"):
        nearest_neighbours(rows, labels, queries, 5)


def test_zero_shot_and_its_file(tmp_path: Path) -> None:
    # "b" has two prompts, whose unit vectors are averaged: (1, 0) and (0, 1), however long the first is.
    save_file(
        {"b": torch.tensor([[9.0, 0.0], [0.0, 1.0]]), "a": torch.tensor([3.0, 0.0], dtype=torch.float16)},
        tmp_path / "t.safetensors",
    )
    names, vectors = read_text_embeddings(tmp_path / "t.safetensors")
    assert names == ("a", "b") and torch.allclose(vectors, torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]]))
    assert zero_shot(torch.tensor([[10.0, 1.0], [1.0, 1.0], [0.0, 0.1]]), vectors).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": torch.ones(3)}, "has 1 tensors"),
        ({"a": torch.ones(3), "b": torch.ones(4)}, "different sizes, \\[3, 4\\]"),
        ({"a": torch.ones(3), "b": torch.zeros(3)}, "'b' has a vector that is zero"),
        ({"a": torch.ones(3), "b": torch.ones(1, 1, 3)}, "'b' has dtype torch.float32 and shape \\(1, 1, 3\\)"),
        ({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.int64)}, "'b' has dtype torch.int64"),
        ({}, "cannot be read as safetensors"),
    ],
)
def test_bad_text_embeddings(tmp_path: Path, tensors: dict[str, Tensor], words: str) -> None:
    file = tmp_path / "t.safetensors"
    if tensors:
        save_file(tensors, file)
    else:
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=words):
        read_text_embeddings(file)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images by colour, eight of each."""
    root = tmp_path_factory.mktemp("images")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir()
        for at in range(8):
            shade = tuple(min(255, value + 3 * at) for value in colour)
            Image.new("RGB", (64 + 8 * at, 64 + 4 * number), shade).save(root / name / f"{at}.png")
    (root / ".hidden").touch()
    return root


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder alone, with a CLIP head and no files of an image processor."""
    torch.manual_seed(0)
    config = FastViTHDConfig(depths=[1, 1, 1, 1, 1], hidden_sizes=[8, 16, 32, 32, 64], projection_dim=6, image_size=128)
    out = tmp_path_factory.mktemp("encoder")
    FastViTHDModel(config).save_pretrained(out)
    return out


def test_folders_are_divided_by_class(image_folder: Path) -> None:
    images = read_class_folders(image_folder)
    assert images.classes == ("blue", "green", "red") and len(images) == 24 and images.paths[8] == "green/0.png"
    train, val, divided = read_labelled_images(image_folder, 0.25, seed=0)
    assert not divided and sorted(train.paths + val.paths) == sorted(images.paths)
    assert [val.labels.count(label) for label in range(3)] == [2, 2, 2]
    assert all(
        images.labels[images.paths.index(path)] == label for path, label in zip(val.paths, val.labels, strict=True)
    )
    assert read_labelled_images(image_folder, 0.25, seed=0)[1] == val
    assert read_labelled_images(image_folder, 0.25, seed=1)[1] != val
    assert [len(split(images, share, 0)[1]) for share in (0.001, 0.999)] == [3, 21]
    with pytest.raises(ValueError, match=r"hold out is 1\.0"):
        split(images, 1.0, 0)


def test_folders_that_are_divided_already(tmp_path: Path) -> None:
    for part, names in (("train", ("a", "b", "c")), ("val", ("c", "a"))):
        for name in names:
            (tmp_path / part / name / "deep").mkdir(parents=True)
            (tmp_path / part / name / "deep" / "1.png").touch()
    train, val, divided = read_labelled_images(tmp_path, 0.2, 0)
    assert divided and train.classes == val.classes == ("a", "b", "c")
    assert (val.paths, val.labels) == (("a/deep/1.png", "c/deep/1.png"), (0, 2))
    (tmp_path / "val" / "d").mkdir()
    (tmp_path / "val" / "d" / "1.png").touch()
    with pytest.raises(ValueError, match="classes that are missing from train: d"):
        read_labelled_images(tmp_path, 0.2, 0)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="not a folder"):
        read_labelled_images(tmp_path / "nothing", 0.2, 0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="a has no images"):
        read_class_folders(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "1.png").touch()
    with pytest.raises(ValueError, match="class 'a' has only one image"):
        read_labelled_images(tmp_path, 0.2, 0)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"2 folders and 1 files, such as 'notes\.txt'"):
        read_class_folders(tmp_path)
    (tmp_path / "only" / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="has only 'train'"):
        read_labelled_images(tmp_path / "only", 0.2, 0)


def test_a_whole_run(bare: Path, image_folder: Path) -> None:
    record = judge_encoder(bare, image_folder, held_out=0.5, batch_size=5, seed=1)
    assert (record["classes"], record["train"], record["val"], record["size"], record["features"]) == (
        3,
        12,
        12,
        128,
        128,
    )
    assert record["aspect"] == "pad" and record["divided_by"] == "seed 1, 0.5 held out"
    # Flat colours: whatever the encoder's weights, they are easily told apart.
    assert record["results"]["probe"]["accuracy"] == 100.0 and record["results"]["probe"]["interval"] == [100.0, 100.0]
    assert record["results"]["knn"]["k"] == 12
    one = judge_encoder(bare, image_folder, methods=("knn",), held_out=0.5, k=1, seed=1, aspect="square", size=64)
    assert one["results"]["knn"]["accuracy"] == 100.0 and (one["size"], one["aspect"]) == (64, "square")


def test_features_are_the_encoders_and_batches_change_nothing(bare: Path, image_folder: Path) -> None:
    encoder, processor = load_encoder(bare)
    images = read_class_folders(image_folder)
    features, pooled = encode(encoder, processor, images, batch_size=7)
    alone, alone_pooled = encode(encoder, processor, images.part([9]), batch_size=1)
    assert torch.allclose(features[9], alone[0], atol=1e-5) and torch.allclose(pooled[9], alone_pooled[0], atol=1e-5)
    with Image.open(image_folder / "green" / "1.png") as image, torch.no_grad():
        output = encoder(processor(image, return_tensors="pt").pixel_values)
    assert torch.allclose(alone[0], output.last_hidden_state.mean((2, 3))[0], atol=1e-5)
    assert torch.allclose(alone_pooled, output.pooler_output, atol=1e-5)
    assert features.shape == (24, 128) and pooled.shape == (24, 6)


def test_zero_shot_run(bare: Path, image_folder: Path, tmp_path: Path) -> None:
    encoder, processor = load_encoder(bare)
    images = read_class_folders(image_folder)
    pooled = encode(encoder, processor, images, 24)[1]
    # The text of each class is the mean embedding of its images.
    texts = {name: pooled[[label == at for label in images.labels]].mean(0) for at, name in enumerate(images.classes)}
    save_file(texts, tmp_path / "t.safetensors")
    record = judge_encoder(bare, image_folder, methods=("zero-shot",), text=tmp_path / "t.safetensors")
    vectors = F.normalize(torch.stack([texts[name] for name in images.classes]), dim=-1)
    right = (F.normalize(pooled, dim=-1) @ vectors.T).argmax(-1) == torch.tensor(images.labels)
    assert (record["val"], record["train"], record["divided_by"]) == (24, 0, "nothing")
    assert record["results"]["zero-shot"]["accuracy"] == pytest.approx(100 * float(right.float().mean()), abs=1e-3)
    # A class that is not there but is every image's nearest makes all of them wrong.
    everything = {"elsewhere": pooled.mean(0)} | {name: -pooled.mean(0) for name in texts}
    save_file(everything, tmp_path / "w.safetensors")
    record = judge_encoder(bare, image_folder, methods=("zero-shot",), text=tmp_path / "w.safetensors")
    assert record["results"]["zero-shot"]["accuracy"] == 0.0 and record["results"]["zero-shot"]["candidates"] == 4
    save_file({name: texts[name] for name in ("blue", "green")}, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="no tensor for 1 of the folder's classes, such as 'red'"):
        judge_encoder(bare, image_folder, methods=("zero-shot",), text=tmp_path / "few.safetensors")
    save_file({name: torch.ones(5) for name in COLOURS}, tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match="5 dimensions, but the encoder's embedding has 6"):
        judge_encoder(bare, image_folder, methods=("zero-shot",), text=tmp_path / "five.safetensors")


def test_out_of_a_whole_checkpoint(checkpoint: Callable[[str], Path], image_folder: Path) -> None:
    directory = checkpoint("qwen2_anyres")
    whole = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32")
    encoder, processor = load_encoder(directory)
    own = encoder.state_dict()
    assert own.keys() >= {"conv_exp.se.reduce.weight"}
    assert all(torch.equal(own[name], tensor) for name, tensor in whole.model.vision_tower.state_dict().items())
    # One view of the whole image, without AnyRes' tiles.
    assert processor.image_aspect_ratio == "pad"
    record = judge_encoder(directory, image_folder, methods=("knn",), held_out=0.5, size=64)
    assert (record["aspect"], record["size"], record["results"]["knn"]["count"]) == ("pad", 64, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ("svm",)}, "expected some of probe, knn, zero-shot"),
        ({"methods": ("zero-shot",)}, "give both or neither"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"regularisation": -1.0}, "regularisation is -1.0"),
        ({"k": 100}, "k is 100; expected 1 to 18"),
    ],
)
def test_options_out_of_range(bare: Path, image_folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        judge_encoder(bare, image_folder, **options)


def test_bad_images_are_named(bare: Path, image_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for at in range(3):
            (tmp_path / name / f"{at}.png").write_bytes((image_folder / "red" / "1.png").read_bytes())
    (tmp_path / "b" / "1.png").write_bytes((image_folder / "red" / "1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b/1\.png"):
        judge_encoder(bare, tmp_path, methods=("knn",))
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "b" / "1.png").symlink_to(image_folder / "red" / "1.png")
    with pytest.raises(ValueError, match="leaves the image folder"):
        judge_encoder(bare, tmp_path, methods=("knn",))


def test_command(bare: Path, image_folder: Path, tmp_path: Path) -> None:
    call = CliRunner().invoke
    result = call(
        app, ["eval-encoder", str(bare), str(image_folder), "--out", str(tmp_path / "r.json"), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.stderr
    assert "probe" in result.stdout and "128 features at 128 px (pad), float32; 18 training images" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["results"]["knn"]["k"] == 18
    for words, message in (
        (["--method", "svm"], "--method has 'svm'"),
        (["--method", "zero-shot"], "--text go together"),
        (["--aspect", "oval"], "expected pad or square"),
        (["--method", "zero-shot", "--text", str(tmp_path / "no.safetensors")], "does not exist"),
    ):
        result = call(app, ["eval-encoder", str(bare), str(image_folder), *words])
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    result = call(app, ["eval-encoder", "tiny", str(image_folder), "--text", str(_texts(tmp_path)), "--device", "cpu"])
    assert result.exit_code == 2 and "without the CLIP head" in result.stderr


def test_quiet_hides_the_bar(bare: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what Rich takes for a terminal
    words = ["eval-encoder", str(bare), str(image_folder), "--method", "knn", "-o", str(tmp_path / "r.json")]
    assert "encoding" in CliRunner().invoke(app, words).stderr
    assert CliRunner().invoke(app, [*words, "--quiet"]).stderr == ""


def _texts(folder: Path) -> Path:
    save_file({name: torch.ones(6) for name in COLOURS}, folder / "t.safetensors")
    return folder / "t.safetensors"
