# SPDX-License-Identifier: Apache-2.0
"""Classifiers on frozen features: a linear probe, k nearest neighbours, and zero-shot classification.

Sources: linear probe as in CLIP, arXiv 2103.00020, section 3.2 and appendix A.3: scikit-learn's logistic regression by
L-BFGS, its regularisation chosen on held-out data; nearest neighbours with weights exp(similarity / 0.07) as in Z. Wu
et al., arXiv 1805.01978, section 3.4; zero-shot classification as in CLIP, section 3.1.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from .._optional import needs
from .tasks import EXTRA

__all__ = ["REGULARISATIONS", "fit_probe", "nearest_neighbours", "read_text_embeddings", "zero_shot"]

REGULARISATIONS = tuple(10.0**power for power in range(2, -7, -1))
"""Candidate regularisation strengths of the linear probe, the strongest first."""

_KNN_TEMPERATURE = 0.07


def fit_probe(
    features: Tensor, labels: Sequence[int], strengths: Sequence[float], held_out: Sequence[bool]
) -> tuple[Any, float, dict[float, float]]:
    """Fit multinomial logistic regression to standardised features.

    It minimises mean cross-entropy + strength / 2 * ‖weight‖²; the bias is not penalised. Constant features become 0.

    Args:
        features: (rows, features), floating point, on the CPU.
        labels: one for each row.
        strengths: candidate regularisation strengths, each 0 or more. The one with the highest accuracy on the held-out
            rows is refitted on all rows; the first wins a tie.
        held_out: whether each row is held out for this selection; ignored if there is only one strength.

    Returns:
        The classifier, whose `predict` takes a NumPy array (rows, features); the chosen strength; and the accuracy on
        the held-out rows by strength, empty for a single strength.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: a feature is not finite, or a strength is negative.
    """
    with needs("scikit-learn", "The method probe", EXTRA):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, PredefinedSplit
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import StandardScaler

    if min(strengths) < 0:
        raise ValueError(f"regularisation is {min(strengths)}; expected 0 or more.")
    if not torch.isfinite(features).all():
        raise ValueError("the features contain NaN or infinity. Encode in float32 (--dtype float32).")
    # scikit-learn sums the losses of the rows and scales that sum by the inverse of the strength.
    weights = {strength: 1 / (strength * len(features)) if strength else np.inf for strength in strengths}
    regression = LogisticRegression(C=weights[strengths[0]], max_iter=1000, tol=1e-6)
    probe = Pipeline([("scaled", StandardScaler()), ("regression", regression)])
    rows = features.numpy()
    if len(strengths) == 1:
        return probe.fit(rows, labels), strengths[0], {}
    folds = PredefinedSplit([0 if out else -1 for out in held_out])
    search = GridSearchCV(probe, {"regression__C": list(weights.values())}, cv=folds).fit(rows, labels)
    shares = dict(zip(strengths, map(float, search.cv_results_["mean_test_score"]), strict=True))
    return search.best_estimator_, strengths[search.best_index_], shares


def nearest_neighbours(features: Tensor, labels: Sequence[int], queries: Tensor, k: int) -> Tensor:
    """Classify each query by its k nearest training rows in cosine similarity; return the labels, (queries,).

    Each neighbour votes with the weight exp(similarity / 0.07).

    Args:
        features: (rows, features), on the CPU.
        labels: one for each row.
        queries: (queries, features), on the CPU.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: k is not between 1 and the number of rows.
    """
    with needs("scikit-learn", "The method knn", EXTRA):
        from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= k <= len(features):
        raise ValueError(f"k is {k}; expected 1 to {len(features)}, the number of training images.")

    def votes(distances: np.ndarray) -> np.ndarray:
        # Relative to the nearest neighbour, so that no sum overflows. The ranking of the classes is unchanged.
        return np.exp((distances.min(1, keepdims=True) - distances) / _KNN_TEMPERATURE)

    classifier = KNeighborsClassifier(k, weights=votes, metric="cosine", algorithm="brute")
    return torch.as_tensor(classifier.fit(features.numpy(), labels).predict(queries.numpy()))


def zero_shot(embeddings: Tensor, texts: Tensor) -> Tensor:
    """Return the index, (images,), of the text with the largest cosine similarity to each image's embedding.

    Args:
        embeddings: (images, dimensions).
        texts: (classes, dimensions).
    """
    return (F.normalize(embeddings, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(-1)


def read_text_embeddings(file: str | os.PathLike[str]) -> tuple[tuple[str, ...], Tensor]:
    """Read a text tower's class embeddings; return the class names and one unit vector for each class.

    The file is in safetensors format and has one tensor for each class, named after it: (dimensions,), or
    (prompts, dimensions). The vectors of several prompts are normalised and averaged.

    Returns:
        The names, sorted, and a float32 tensor (classes, dimensions).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not have this form.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a safetensors file with a tensor for each class.")
    try:
        with safe_open(path, framework="pt") as content:
            found = {name: content.get_tensor(name) for name in sorted(content.keys())}
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}. The file is damaged or has another format."
        ) from error
    if len(found) < 2:
        raise ValueError(f"{path} has {len(found)} tensors; expected one for each of two or more classes.")
    vectors = []
    for name, tensor in found.items():
        if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name!r} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected a floating-point "
                "tensor of shape (dimensions,) or (prompts, dimensions)."
            )
        prompts = tensor.float().reshape(-1, tensor.shape[-1])
        if not torch.isfinite(prompts).all() or not prompts.norm(dim=-1).all():
            raise ValueError(f"{path}: {name!r} has a vector that is zero or not finite; it cannot be normalised.")
        vectors.append(F.normalize(F.normalize(prompts, dim=-1).mean(0), dim=-1))
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1:
        raise ValueError(f"{path} has embeddings of different sizes, {sizes}; expected one size for all classes.")
    return tuple(found), torch.stack(vectors)
