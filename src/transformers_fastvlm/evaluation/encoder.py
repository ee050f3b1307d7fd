# SPDX-License-Identifier: Apache-2.0
"""Evaluation of FastViTHD without a language model: accuracy of simple classifiers on its frozen features."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import FastViTHDModel, FastVLMImageProcessorPil
from ..checkpoints.embedded import resolve_model
from ..data.image_files import ImageFolder
from ..images.read_options import Colour, ReadOptions, as_colour
from .bootstrap import CONFIDENCE, RESAMPLES, interval, resampled_means
from .classifiers import REGULARISATIONS, fit_probe, nearest_neighbours, read_text_embeddings, zero_shot
from .labelled_images import LabelledImages, read_class_folders, read_labelled_images, split

__all__ = ["KNN", "METHODS", "PROBE", "ZERO_SHOT", "encode", "judge_encoder", "load_encoder"]

PROBE, KNN, ZERO_SHOT = METHODS = ("probe", "knn", "zero-shot")

_NEIGHBOURS = 20
_HELD_OUT_FOR_REGULARISATION = 0.2


def judge_encoder(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    methods: tuple[str, ...] = (PROBE, KNN),
    text: str | os.PathLike[str] | None = None,
    size: int | None = None,
    aspect: str | None = None,
    batch_size: int = 16,
    k: int | None = None,
    regularisation: float | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    do_exif_transpose: bool = True,
    alpha_background: Colour = "white",
    max_pixels: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Measure the quality of an encoder's frozen features on an image classification data set.

    The probe and k-NN use the mean of the last feature map. Zero-shot classification uses the CLIP embedding, so the
    encoder must have that head. Features are kept in memory only.

    Args:
        model: directory or hub repository of a FastVLM, or of an encoder alone.
        folder: contains `train/CLASS/…` and `val/CLASS/…`, or `CLASS/…` (see `held_out`).
        methods: some of "probe" (logistic regression), "knn" and "zero-shot".
        text: for "zero-shot", a file for `read_text_embeddings` with a tensor for each class of the folder. Further
            classes in the file can be predicted too and count as wrong.
        size: height and width in pixels, a multiple of 64; None for the checkpoint's.
        aspect: "pad" or "square" (crop); None for the checkpoint's, and "pad" for AnyRes.
        batch_size: images in a batch of the encoder.
        k: number of neighbours; None for 20, or for all training images if there are fewer.
        regularisation: of the probe; None selects it on a fifth of the training images and refits on all of them.
        held_out: share of each class used for validation if the folder has no `train` and `val`. Zero-shot
            classification alone uses all images for validation.
        seed: of both splits and of the bootstrap.
        device, dtype: of the encoder; features are float32.
        do_exif_transpose, alpha_background, max_pixels: how images are read, see `images.read_options.ReadOptions`.
        progress: called with the numbers of images encoded and to encode.

    Returns:
        A record: `model`, `folder`, `size`, `aspect`, `features`, `dtype`, `classes`, `train` and `val` (numbers of
        images), `seconds`, and `results` by method, each with `accuracy` and `interval` in percent, `per_class` (mean
        of the classes' accuracies), `count`, and the hyperparameters used.

    Raises:
        OSError: the model or the folder does not exist.
        ImportError: scikit-learn is missing; "probe" and "knn" need it.
        ValueError: an option, image or embedding is invalid; the message names the image's file.
    """
    _check(methods, text, batch_size, regularisation)
    has_split = all(os.path.isdir(os.path.join(folder, name)) for name in ("train", "val"))
    unsplit = methods == (ZERO_SHOT,) and not has_split
    if unsplit:
        val = read_class_folders(folder)
        train, divided = val.part([]), False
    else:
        train, val, divided = read_labelled_images(folder, held_out, seed)
    texts = _texts(text, val) if text is not None else None
    encoder, processor = load_encoder(model, size=size, aspect=aspect, device=device, dtype=dtype)
    if texts is not None:
        _check_head(encoder, texts[1], model)
    learns = PROBE in methods or KNN in methods
    number = k if k is not None else min(_NEIGHBOURS, len(train))
    if KNN in methods and not 1 <= number <= len(train):
        raise ValueError(f"k is {number}; expected 1 to {len(train)}, the number of training images.")
    if PROBE in methods and regularisation is None:
        split(train, _HELD_OUT_FOR_REGULARISATION, seed)  # fail before the encoding, not after it
    start = time.perf_counter()
    total = len(val) + (len(train) if learns else 0)
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    processor.do_exif_transpose, processor.max_pixels = do_exif_transpose, max_pixels
    processor.alpha_background = as_colour(alpha_background)
    queries, embeddings = encode(encoder, processor, val, batch_size, advance)
    known = encode(encoder, processor, train, batch_size, advance)[0] if learns else torch.empty(0)
    seconds = time.perf_counter() - start
    labels, classes = torch.tensor(val.labels), len(val.classes)
    results: dict[str, Any] = {}
    for method in methods:
        if method == PROBE:
            predicted, chosen = _probe(train, known, queries, regularisation, seed)
        elif method == KNN:
            predicted = nearest_neighbours(known, train.labels, queries, number)
            chosen = {"k": number}
        else:
            assert texts is not None
            answers, vectors = texts
            predicted, chosen = answers[zero_shot(embeddings, vectors)], {"candidates": len(vectors)}
        results[method] = _result(predicted == labels, labels, method, seed) | chosen
    return {
        "model": os.fspath(model),
        "folder": os.fspath(folder),
        "divided_by": "folder" if divided else "nothing" if unsplit else f"seed {seed}, {held_out:g} held out",
        "size": int(processor.size["height"]),
        "aspect": processor.image_aspect_ratio,
        "features": queries.shape[-1],
        "dtype": str(dtype).removeprefix("torch."),
        "classes": classes,
        "train": len(train) if learns else 0,
        "val": len(val),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seconds": round(seconds, 3),
        "results": results,
    }


def load_encoder(
    model: str | os.PathLike[str],
    *,
    size: int | None = None,
    aspect: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[FastViTHDModel, FastVLMImageProcessorPil]:
    """Load an encoder, alone or from a FastVLM checkpoint, and its image processor.

    A directory with an encoder alone needs no processor files: the processor then pads, as Apple's does, and takes its
    size from the encoder's configuration.
    """
    source = resolve_model(model)
    encoder: Any = FastViTHDModel.from_pretrained(source, dtype=dtype)
    encoder = encoder.to(device).eval().requires_grad_(False)
    processor: Any = FastVLMImageProcessorPil.from_pretrained(source)
    if aspect is None:
        aspect = "pad" if processor.image_aspect_ratio == "anyres" else processor.image_aspect_ratio
    if size is None:
        size = int(processor.size["height"])
    # Keep the processor's options except the AnyRes grids, which are not used here.
    unused = ("image_processor_type", "image_grid_pinpoints", "processor_class")
    options = {name: value for name, value in processor.to_dict().items() if name not in unused}
    options |= {"size": {"height": size, "width": size}, "image_aspect_ratio": aspect}
    return encoder, FastVLMImageProcessorPil(**options)


@torch.inference_mode()
def encode(
    encoder: FastViTHDModel,
    processor: FastVLMImageProcessorPil,
    images: LabelledImages,
    batch_size: int,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[Tensor, Tensor]:
    """Return the mean features, (images, channels), and the pooled output, (images, dimensions), in float32.

    Args:
        advance: called after each batch with its number of images.

    Raises:
        ValueError: an image cannot be read; the message names its file.
    """
    folder = ImageFolder(
        images.folder,
        reading=ReadOptions(
            do_exif_transpose=processor.do_exif_transpose,
            alpha_background=processor.alpha_background,
            max_pixels=processor.max_pixels,
        ),
    )
    means: list[Tensor] = []
    pooled: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        paths = images.paths[start : start + batch_size]
        pixels = processor([folder.open(path) for path in paths], return_tensors="pt").pixel_values
        output = encoder(pixels.to(encoder.device, encoder.dtype))
        means.append(output.last_hidden_state.float().mean((2, 3)).cpu())
        pooled.append(output.pooler_output.float().cpu())
        advance(len(paths))
    features = torch.cat(means)
    if not torch.isfinite(features).all():
        raise ValueError(f"the encoder's features contain NaN or infinity in {encoder.dtype}. Encode in float32.")
    return features, torch.cat(pooled)


def _check(methods: tuple[str, ...], text: Any, batch_size: int, regularisation: float | None) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods are {methods}; expected some of {', '.join(METHODS)}.")
    if (ZERO_SHOT in methods) != (text is not None):
        raise ValueError("zero-shot classification needs text embeddings, and only it uses them; give both or neither.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
    if regularisation is not None and not regularisation >= 0:
        raise ValueError(f"regularisation is {regularisation}; expected 0 or more.")


def _texts(text: str | os.PathLike[str], images: LabelledImages) -> tuple[Tensor, Tensor]:
    """Return the label of each text's class, -1 for a class missing from the folder, and the vectors."""
    names, vectors = read_text_embeddings(text)
    missing = [name for name in images.classes if name not in names]
    if missing:
        raise ValueError(
            f"{text} has no tensor for {len(missing)} of the folder's classes, such as {missing[0]!r}; expected one "
            "for each class, named after its folder."
        )
    return torch.tensor([images.classes.index(name) if name in images.classes else -1 for name in names]), vectors


def _check_head(encoder: FastViTHDModel, texts: Tensor, model: Any) -> None:
    dimensions = encoder.config.projection_dim
    if not dimensions:
        raise ValueError(
            f"{model} has an encoder without the CLIP head (projection_dim is 0), so its features cannot be compared "
            "with text embeddings. Use the methods probe and knn."
        )
    if texts.shape[1] != dimensions:
        raise ValueError(
            f"the text embeddings have {texts.shape[1]} dimensions, but the encoder's embedding has {dimensions}; "
            "expected embeddings of the text tower that it was trained with."
        )


def _probe(
    train: LabelledImages, known: Tensor, queries: Tensor, regularisation: float | None, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    strengths, checked = REGULARISATIONS, set[str]()
    if regularisation is None:
        checked = set(split(train, _HELD_OUT_FOR_REGULARISATION, seed)[1].paths)
    else:
        strengths = (regularisation,)
    probe, strength, tried = fit_probe(known, train.labels, strengths, [path in checked for path in train.paths])
    chosen: dict[str, Any] = {"regularisation": strength, "iterations": int(probe["regression"].n_iter_.max())}
    if tried:
        chosen["tried"] = {f"{strength:g}": round(100 * share, 2) for strength, share in sorted(tried.items())}
    return torch.as_tensor(probe.predict(queries.numpy())), chosen


def _result(right: Tensor, labels: Tensor, method: str, seed: int) -> dict[str, Any]:
    scores = right.double() * 100
    low, high = interval(resampled_means(scores.tolist(), method, seed=seed))
    per_class = torch.stack([scores[labels == label].mean() for label in labels.unique()]).mean()
    return {
        "accuracy": round(float(scores.mean()), 4),
        "interval": [round(low, 4), round(high, 4)],
        "per_class": round(float(per_class), 4),
        "count": len(labels),
    }
