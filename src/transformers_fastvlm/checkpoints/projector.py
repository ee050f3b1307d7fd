# SPDX-License-Identifier: Apache-2.0
"""The output of LLaVA's first training stage: `mm_projector.bin`, a pickled dictionary of tensors."""

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layouts import to_our_name

if TYPE_CHECKING:
    import torch

__all__ = ["load_projector", "load_tensors"]

_NAMES = tuple(
    f"model.multi_modal_projector.{layer}.{kind}" for layer in ("linear_1", "linear_2") for kind in ("weight", "bias")
)


def load_projector(path: str | os.PathLike[str]) -> "dict[str, torch.Tensor]":
    """Return the projector's four tensors, on the CPU, under our names.

    Args:
        path: `mm_projector.bin` of a first stage, or a safetensors file with the same tensors, under Apple's names
            (`model.mm_projector.0.weight` and so on) or ours. A pickle is read as data only: code in it does not run.

    Returns:
        `model.multi_modal_projector.linear_1.weight` (text width, encoder channels), `….linear_1.bias` (text width,),
        `….linear_2.weight` (text width, text width) and `….linear_2.bias` (text width,).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, does not hold exactly these four tensors, or their shapes do not match.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the mm_projector.bin of a first training stage.")
    content = load_tensors(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dictionary of the projector's tensors.")
    unknown = [name for name in content if to_our_name(name) not in _NAMES]
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} entries that are not the projector's: {', '.join(sorted(unknown)[:10])}. "
            "Expected model.mm_projector.{0,2}.{weight,bias} and nothing else."
        )
    tensors = {to_our_name(name): tensor for name, tensor in content.items()}
    missing = [name for name in _NAMES if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; expected a projector of two linear layers (mlp2x_gelu).")
    if len(tensors) != len(content):
        raise ValueError(
            f"{path} holds a tensor twice, under Apple's name and under ours: {', '.join(sorted(content))}."
        )
    _check(path, [tensors[name] for name in _NAMES])
    return {name: tensors[name] for name in _NAMES}


def load_tensors(path: Path) -> Any:
    """Return the content of a safetensors file or a pickle, on the CPU; a pickle is read as data only.

    Raises:
        ValueError: the file is damaged, or a pickle holds more than data.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors: {error}. It is damaged; download it again."
            ) from error
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not loaded: it is damaged, or holds more than tensors and could run code "
            f"({str(error).splitlines()[0]})."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path} cannot be read as a PyTorch file: {error}. It is damaged; download it again."
        ) from error


def _check(path: Path, tensors: list[Any]) -> None:
    import torch

    if not all(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors):
        kinds = [str(getattr(tensor, "dtype", type(tensor).__name__)) for tensor in tensors]
        raise ValueError(f"{path} holds {', '.join(kinds)}; expected four floating-point tensors.")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    width = shapes[1][0] if len(shapes[1]) == 1 else -1
    if len(shapes[0]) != 2 or shapes[0][0] != width or shapes[1:] != [(width,), (width, width), (width,)]:
        raise ValueError(
            f"{path} holds the shapes {', '.join(map(str, shapes))}; expected weight (D, F), bias (D,), weight (D, D), "
            "bias (D,) with text width D and encoder channels F."
        )
