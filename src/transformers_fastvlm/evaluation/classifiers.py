# SPDX-License-Identifier: Apache-2.0
"""Classifiers on features that stay as they are: a linear probe, nearest neighbours, and embeddings of texts.

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
"""Strengths that the linear probe chooses from, the strongest first."""

_KNN_TEMPERATURE = 0.07


def fit_probe(
    features: Tensor, labels: Sequence[int], strengths: Sequence[float], held_out: Sequence[bool]
) -> tuple[Any, float, dict[float, float]]:
    """Fit multinomial logistic regression to standardised features.

    It minimises mean cross-entropy + strength / 2 * ‖weight‖²; the bias is not penalised. Features that are constant
    count as 0.

    Args:
        features: (rows, features), floating point, on the CPU.
        labels: one a row.
        strengths: of the regularisation, 0 or more. Of several, the one whose probe is right most often on the rows
            that are held out is fitted to all; of equally good ones the first.
        held_out: of each row whether it is for that choice; without a choice it has no use.

    Returns:
        The classifier, whose `predict` takes NumPy's (rows, features); the strength; and by strength the share of
        right answers on what was held out, empty without a choice.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: features that are not finite, or a negative strength.
    """
    with needs("scikit-learn", "The method probe", EXTRA):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, PredefinedSplit
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import StandardScaler

    if min(strengths) < 0:
        raise ValueError(f"regularisation is {min(strengths)}; expected 0 or more.")
    if not torch.isfinite(features).all():
        raise ValueError("features hold numbers that are not finite. Encode in float32 (--dtype float32).")
    # scikit-learn weighs the sum of the rows' losses, by the inverse of the strength.
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
    """Return the class, (queries,), that the k training rows of the largest cosine similarity vote for.

    Each votes with the weight exp(similarity / 0.07).

    Args:
        features: (rows, features), on the CPU.
        labels: one a row.
        queries: (queries, features), on the CPU.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: k is not between 1 and the number of rows.
    """
    with needs("scikit-learn", "The method knn", EXTRA):
        from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= k <= len(features):
        raise ValueError(f"k is {k}; expected 1 to {len(features)}, the number of training pictures.")

    def votes(distances: np.ndarray) -> np.ndarray:
        # Relative to the nearest one, so that no sum overflows; that changes no order.
        return np.exp((distances.min(1, keepdims=True) - distances) / _KNN_TEMPERATURE)

    classifier = KNeighborsClassifier(k, weights=votes, metric="cosine", algorithm="brute")
    return torch.as_tensor(classifier.fit(features.numpy(), labels).predict(queries.numpy()))


def zero_shot(embeddings: Tensor, texts: Tensor) -> Tensor:
    """Return the index, (pictures,), of the text that each picture's embedding has the largest cosine similarity with.

    Args:
        embeddings: (pictures, dimensions).
        texts: (classes, dimensions).
    """
    return (F.normalize(embeddings, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(-1)


def read_text_embeddings(file: str | os.PathLike[str]) -> tuple[tuple[str, ...], Tensor]:
    """Return the classes of a file of a text tower's embeddings, and one unit vector a class.

    The file is in safetensors format and has a tensor for each class, under the class's name: (dimensions,), or
    (prompts, dimensions), whose unit vectors are averaged.

    Returns:
        The names, sorted, and a float32 tensor (classes, dimensions).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in that form.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a safetensors file with a tensor for each class.")
    try:
        with safe_open(path, framework="pt") as content:
            found = {name: content.get_tensor(name) for name in sorted(content.keys())}
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}. It is damaged, or of another format."
        ) from error
    if len(found) < 2:
        raise ValueError(f"{path} has {len(found)} tensors; expected one for each of two or more classes.")
    vectors = []
    for name, tensor in found.items():
        if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected floating-point numbers, "
                "(dimensions,) or (prompts, dimensions)."
            )
        prompts = tensor.float().reshape(-1, tensor.shape[-1])
        if not torch.isfinite(prompts).all() or not prompts.norm(dim=-1).all():
            raise ValueError(f"{path}: {name!r} has a vector that is zero or not finite; it has no direction.")
        vectors.append(F.normalize(F.normalize(prompts, dim=-1).mean(0), dim=-1))
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1:
        raise ValueError(
            f"{path} has embeddings of different sizes, {sizes}; expected one size, that of the text tower."
        )
    return tuple(found), torch.stack(vectors)
