# SPDX-License-Identifier: Apache-2.0
"""Images in class folders: the folder's name is the class."""

import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LabelledImages", "read_class_folders", "read_labelled_images", "split"]


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        folder: `paths` are relative to it.
        classes: sorted names; labels are indices into it.
        paths: of the images, relative to `folder`.
        labels: one for each image.
    """

    folder: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, indices: list[int]) -> "LabelledImages":
        """Return the images at these indices, with the same classes."""
        paths, labels = (tuple(values[index] for index in indices) for values in (self.paths, self.labels))
        return LabelledImages(self.folder, self.classes, paths, labels)  # type: ignore[arg-type]


def read_class_folders(folder: str | os.PathLike[str]) -> LabelledImages:
    """Return the images of `folder/CLASS/…`, including those in subfolders of a class.

    Names that begin with a dot are skipped. All other files count as images; reading a file of another kind fails
    later.

    Raises:
        NotADirectoryError: the folder does not exist.
        ValueError: the folder has fewer than two class folders, files beside them, or a class without files.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder; expected one with a folder for each class.")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    stray = [entry.name for entry in entries if not entry.is_dir()]
    classes = [entry.name for entry in entries if entry.is_dir()]
    if stray or len(classes) < 2:
        raise ValueError(
            f"{root} has {len(classes)} folders and {len(stray)} files{f', such as {stray[0]!r}' if stray else ''}; "
            "expected two or more folders, one for each class, and no files beside them."
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            file.relative_to(root).as_posix()
            for file in (root / name).rglob("*")
            if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(root).parts)
        )
        if not found:
            raise ValueError(f"{root / name} has no images; expected at least one. Add images or remove the folder.")
        paths += found
        labels += [label] * len(found)
    return LabelledImages(root, tuple(classes), tuple(paths), tuple(labels))


def read_labelled_images(
    folder: str | os.PathLike[str], held_out: float, seed: int
) -> tuple[LabelledImages, LabelledImages, bool]:
    """Return the training images, the validation images, and whether the split comes from the folder.

    Args:
        folder: contains `train/CLASS/…` and `val/CLASS/…`, or `CLASS/…`, which is then split.
        held_out: share of each class used for validation, in (0, 1), if the folder has no `train` and `val`.
        seed: of that split.

    Raises:
        NotADirectoryError, ValueError: as `read_class_folders`; or a class of `val` is missing from `train`.
    """
    root = Path(folder)
    names = {entry.name for entry in root.iterdir() if entry.is_dir()} if root.is_dir() else set()
    if not {"train", "val"} <= names:
        if names and names <= {"train", "val"}:
            raise ValueError(f"{root} has only {names.pop()!r}; expected both train and val, or class folders.")
        return *split(read_class_folders(root), held_out, seed), False
    train, val = read_class_folders(root / "train"), read_class_folders(root / "val")
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown:
        raise ValueError(
            f"{root / 'val'} has classes that are missing from train: {', '.join(unknown[:10])}. Add training images."
        )
    labels = tuple(train.classes.index(val.classes[label]) for label in val.labels)
    return train, LabelledImages(val.folder, train.classes, val.paths, labels), True


def split(images: LabelledImages, held_out: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split images by class; of each class at least one image is held out and at least one is kept.

    Returns:
        The kept and the held-out images.

    Raises:
        ValueError: `held_out` is not between 0 and 1, or a class has only one image.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the share to hold out is {held_out}; expected a number between 0 and 1.")
    counts = Counter(images.labels)
    single = [name for label, name in enumerate(images.classes) if counts[label] == 1]
    if single:
        raise ValueError(
            f"{images.folder}: class {single[0]!r} has only one image, so none can be held out; expected two or more "
            "in each class."
        )
    rng = random.Random(seed)
    out: set[int] = set()
    for label in sorted(counts):
        own = [index for index, other in enumerate(images.labels) if other == label]
        number = min(len(own) - 1, max(1, round(held_out * len(own))))
        out |= set(rng.sample(own, number))
    everything = range(len(images))
    return images.part([i for i in everything if i not in out]), images.part([i for i in everything if i in out])
