# SPDX-License-Identifier: Apache-2.0
"""Classifiers on features that stay as they are: a linear probe, nearest neighbours, and embeddings of texts.

Sources: linear probe as in CLIP, arXiv 2103.00020, section 3.2 and appendix A.3: logistic regression by L-BFGS, its
regularisation chosen on held-out data; nearest neighbours with weights exp(similarity / 0.07) as in Z. Wu et al., arXiv
1805.01978, section 3.4; zero-shot classification as in CLIP, section 3.1.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "KNN_TEMPERATURE",
    "REGULARISATIONS",
    "LinearProbe",
    "choose_regularisation",
    "fit_probe",
    "nearest_neighbours",
    "read_text_embeddings",
    "zero_shot",
]

REGULARISATIONS = tuple(10.0**power for power in range(-6, 3))
"""Strengths that the linear probe chooses from."""

KNN_TEMPERATURE = 0.07
_ITERATIONS = 1000
_ROWS = 1024


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier: logits ((x - mean) / scale) @ weight + bias.

    Attributes:
        mean, scale: (features,), of the training data.
        weight: (features, classes).
        bias: (classes,).
        loss: the objective at the end, cross-entropy and penalty.
        gradient: largest absolute value of its gradient there: how near this is to the optimum.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    loss: float
    gradient: float

    def predict(self, features: Tensor) -> Tensor:
        """Return the likeliest class, (rows,), of features (rows, features)."""
        return (((features - self.mean) / self.scale) @ self.weight + self.bias).argmax(-1)


def fit_probe(
    features: Tensor, labels: Tensor, classes: int, regularisation: float, start: LinearProbe | None = None
) -> LinearProbe:
    """Fit multinomial logistic regression to standardised features.

    It minimises mean cross-entropy + regularisation / 2 * ‖weight‖², a convex function, by L-BFGS with a line search
    from zero or from another probe; the bias is not penalised. Features that are constant count as 0.

    Args:
        features: (rows, features), floating point.
        labels: (rows,), int64.
        classes: how many there are; some may have no rows.
        regularisation: 0 or more; at 0 separable data has no optimum, and the fit ends after its steps.

    Raises:
        ValueError: features that are not finite, no rows, or a negative regularisation.
    """
    if not len(features) or regularisation < 0:
        raise ValueError(f"{len(features)} rows at regularisation {regularisation}; expected 1 or more at 0 or more.")
    if not torch.isfinite(features).all():
        raise ValueError("features hold numbers that are not finite. Encode in float32 (--dtype float32).")
    with torch.inference_mode(False), torch.enable_grad():
        features = features.detach().clone()
        mean = features.mean(0)
        deviation = features.std(0, correction=0)
        scale = torch.where(deviation > 1e-6 * mean.abs().clamp_min(1e-30), deviation, torch.ones_like(deviation))
        inputs = (features - mean) / scale
        labels = labels.clone()
        parameters = torch.zeros(features.shape[1] + 1, classes, dtype=features.dtype, device=features.device)
        if start is not None:
            parameters.copy_(torch.cat([start.weight, start.bias[None]]))
        parameters.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=_ITERATIONS,
            history_size=10,
            tolerance_grad=1e-7,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            weight, bias = parameters[:-1], parameters[-1]
            loss = F.cross_entropy(inputs @ weight + bias, labels) + regularisation / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        loss = float(closure().detach())
        gradient = parameters.grad
        assert gradient is not None
        return LinearProbe(
            mean, scale, parameters[:-1].detach(), parameters[-1].detach(), loss, float(gradient.abs().max())
        )


def choose_regularisation(
    features: Tensor,
    labels: Tensor,
    held_out_features: Tensor,
    held_out_labels: Tensor,
    classes: int,
    strengths: Sequence[float] = REGULARISATIONS,
) -> tuple[float, dict[float, float]]:
    """Return the strength whose probe is right most often on held-out rows, and each one's share of right answers.

    Of several the strongest is taken. Strengths are tried from the strongest on, each starting where the last ended.
    """
    found: dict[float, float] = {}
    probe = None
    for strength in sorted(strengths, reverse=True):
        probe = fit_probe(features, labels, classes, strength, probe)
        found[strength] = float((probe.predict(held_out_features) == held_out_labels).float().mean())
    best = max(found, key=lambda strength: (found[strength], strength))
    return best, found


def nearest_neighbours(features: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int) -> Tensor:
    """Return the class, (queries,), that the k training rows of the largest cosine similarity vote for.

    Each votes with the weight exp(similarity / 0.07).

    Args:
        features: (rows, features).
        labels: (rows,), int64.
        queries: (queries, features).

    Raises:
        ValueError: k is not between 1 and the number of rows.
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"k is {k}; expected 1 to {len(features)}, the number of training pictures.")
    known = F.normalize(features, dim=-1)
    predicted = []
    for part in F.normalize(queries, dim=-1).split(_ROWS):
        similarity, nearest = (part @ known.T).topk(k)
        # Divided by the largest, so that no sum overflows; that changes no order.
        weights = ((similarity - similarity[:, :1]) / KNN_TEMPERATURE).exp()
        votes = torch.zeros(len(part), classes, dtype=weights.dtype, device=weights.device)
        predicted.append(votes.scatter_add_(1, labels[nearest], weights).argmax(-1))
    return torch.cat(predicted)


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
