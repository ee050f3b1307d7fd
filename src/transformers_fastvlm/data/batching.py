# SPDX-License-Identifier: Apache-2.0
"""The order of training: batches of rows of one kind and of similar length, the same on every process.

A batch is padded to its longest row, so rows of similar length waste little. Rows of text alone come in batches of
their own, and whenever one process has such a batch, all have one: where a model is sharded, processes that disagree
whether the encoder runs wait for each other forever.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Sampler

from ..tokens import IMAGE_TOKEN

__all__ = ["ModalityLengthSampler", "grouped_sampler", "row_lengths"]

logger = logging.getLogger(__name__)

_BYTES_A_TOKEN = 4
_DEFAULT_IMAGE_TOKENS = 256


def row_lengths(dataset: Any, tokens_per_image: int = _DEFAULT_IMAGE_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """Return about how many tokens each sample has, and whether it has an image.

    The words of each row are read, at some ten thousand rows a second; a token is taken to be four bytes of them. No
    image is opened if the data set has a method `messages(index)`, as that of `load` has. Of any other, every sample
    is made once.

    Args:
        dataset: of samples, or a `ConcatDataset` of such.
        tokens_per_image: 256 for a square of 1024 pixels.

    Returns:
        (rows,) int32 and (rows,) bool.

    Raises:
        ValueError: the data set has no length.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [row_lengths(part, tokens_per_image) for part in dataset.datasets]
        lengths, has_image = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return lengths, has_image
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"a {type(dataset).__name__} has no length, so its rows cannot be grouped.")
    messages_of = getattr(dataset, "messages", None)
    if messages_of is None:
        logger.warning(
            "To group by length, all %d samples of the %s are made once.", len(dataset), type(dataset).__name__
        )
    lengths, has_image = np.zeros(len(dataset), np.int32), np.zeros(len(dataset), bool)
    for index in range(len(dataset)):
        messages = dataset[index]["messages"] if messages_of is None else messages_of(index)
        images = sum(turn["content"].count(IMAGE_TOKEN) for turn in messages)
        words = sum(len(turn["content"].encode(errors="replace")) for turn in messages)
        lengths[index] = words // _BYTES_A_TOKEN + images * tokens_per_image
        has_image[index] = images > 0
    return lengths, has_image


def grouped_sampler(
    dataset: Any, args: Any, tokens_per_image: int = _DEFAULT_IMAGE_TOKENS
) -> "ModalityLengthSampler | None":
    """Return the sampler that fits a run's `TrainingArguments`, or None for a data set without a length.

    Args:
        dataset, tokens_per_image: as in `row_lengths`.
        args: of the run.

    Example:
        >>> class GroupingTrainer(Trainer):  # doctest: +SKIP
        ...     def _get_train_sampler(self, train_dataset=None):
        ...         self.sampler = grouped_sampler(train_dataset or self.train_dataset, self.args)
        ...         return self.sampler
        ...     def get_train_dataloader(self):
        ...         loader = super().get_train_dataloader()
        ...         loader.set_sampler(self.sampler)
        ...         return loader
    """
    if not hasattr(dataset, "__len__"):
        return None
    lengths, has_image = row_lengths(dataset, tokens_per_image)
    return ModalityLengthSampler(
        lengths,
        has_image,
        batch_size=args.train_batch_size,
        num_processes=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=args.dataloader_drop_last,
    )


class ModalityLengthSampler(Sampler[int]):
    """Indices in such an order that each batch has rows of one kind and of similar length.

    Rows with images and rows of text alone are each shuffled, cut into windows of many batches, sorted by length
    within a window, and cut into steps: one batch for each process, all of the same kind. Then the steps are shuffled,
    the one with the longest row first, so that memory runs out at once or never. The order follows from `seed` and the
    epoch alone, so a run that is resumed goes on where it was.

    It is meant for `Trainer`, or any loop with accelerate, which deals the batches of a plain sampler out to the
    processes in turn (`split_batches=False`). To be told of the epoch after a run on several processes is resumed,
    accelerate needs `dataloader.set_sampler(sampler)` once.

    With one process the rows that fill no batch of their kind come last, mixed. With several, each kind is filled up
    to whole steps by rows of its own that come twice, at most `batch_size * num_processes - 1` of them, as accelerate
    and PyTorch's DistributedSampler do; or with `drop_last` cut down, other rows each epoch.

    Args:
        lengths: tokens of each row, exact or not; None to group by kind alone.
        has_image: whether each row has an image; None if all rows are of one kind.
        batch_size: rows of a batch on one process.
        num_processes: that train together.
        seed: of the order.
        drop_last: leave out rows rather than take some twice (or, with one process, than end with a small batch).
        window: batches of all processes among which rows are sorted by length; more waste less and shuffle less.

    Raises:
        ValueError: nothing to order, arguments that do not fit, or no whole step with `drop_last`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | None,
        has_image: Sequence[bool] | np.ndarray | None = None,
        *,
        batch_size: int,
        num_processes: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        window: int = 50,
    ) -> None:
        given = [np.asarray(values) for values in (lengths, has_image) if values is not None]
        if not given or not len(given[0]) or any(values.shape != (len(given[0]),) for values in given):
            raise ValueError(
                "lengths and has_image have the shapes "
                f"{', '.join(str(values.shape) for values in given) or 'of None'}; expected (rows,), at least one row, "
                "the same for both."
            )
        for name, value in (("batch_size", batch_size), ("num_processes", num_processes), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        self.num_rows = len(given[0])
        self.lengths = np.zeros(self.num_rows, np.int64) if lengths is None else np.asarray(lengths, np.int64)
        self.has_image = np.ones(self.num_rows, bool) if has_image is None else np.asarray(has_image, bool)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.seed = seed
        self.drop_last = drop_last
        self.window = window
        self.epoch = 0
        if not len(self):
            raise ValueError(
                f"{self.num_rows} rows make no whole step of {num_processes} batches of {batch_size} of one kind, and "
                "drop_last leaves out the rest. Use a smaller batch, or drop_last=False."
            )

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; accelerate and Trainer do."""
        self.epoch = epoch

    def __len__(self) -> int:
        step = self.batch_size * self.num_processes
        images = int(self.has_image.sum())
        kinds = (images, self.num_rows - images)
        if self.drop_last:
            return sum(rows // step for rows in kinds) * step
        if self.num_processes == 1:
            return self.num_rows
        return sum(-(-rows // step) for rows in kinds) * step

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        kinds = [np.flatnonzero(self.has_image == kind) for kind in (True, False)]
        steps, rests = zip(*(self._steps(random.permutation(rows)) for rows in kinds), strict=True)
        order = np.concatenate(steps)
        order = order[random.permutation(len(order))]
        if len(order):
            longest = int(self.lengths[order].max(axis=1).argmax())
            order[[0, longest]] = order[[longest, 0]]
        return iter(np.concatenate([order.ravel(), *rests]).tolist())

    def _steps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps that rows of one kind make, (steps, rows of a step), and those that are left over."""
        step = self.batch_size * self.num_processes
        whole = len(rows) // step * step
        rest = rows[whole:]
        if len(rest) and self.num_processes > 1 and not self.drop_last:
            rows = np.resize(rows, whole + step)
            whole, rest = len(rows), rows[:0]
        elif self.drop_last:
            rest = rows[:0]
        rows = rows[:whole]
        # One key for both, which is several times as fast as sorting twice: first the window, then the longest.
        windows = np.arange(whole) // (self.window * step)
        rows = rows[np.argsort((windows << 32) - self.lengths[rows], kind="stable")]
        # Neighbours go to different processes, so that all have about the same to do.
        dealt = rows.reshape(-1, self.batch_size, self.num_processes).transpose(0, 2, 1)
        return dealt.reshape(-1, step), rest
