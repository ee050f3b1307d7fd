# SPDX-License-Identifier: Apache-2.0
"""The order of training: batches of rows of one kind and of similar length, the same on every process.

A batch is padded to its longest row, so grouping by length reduces padding. Text-only rows form separate batches, and
all processes get such a batch in the same step: with a sharded model, processes that disagree on whether the encoder
runs deadlock.
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
    """Return the approximate number of tokens of each sample, and whether it has an image.

    The text of each row is read, at about ten thousand rows per second, and counted as one token per four bytes. No
    image is opened if the data set has a method `messages(index)`, as the data sets of `load` have. For any other data
    set every sample is loaded once.

    Args:
        dataset: a data set of samples, or a `ConcatDataset` of them.
        tokens_per_image: tokens of one image; 256 for a square of 1024 pixels.

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
            "To group by length, all %d samples of the %s are loaded once.", len(dataset), type(dataset).__name__
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
    """Return the sampler for a run's `TrainingArguments`, or None for a data set without a length.

    Args:
        dataset, tokens_per_image: as in `row_lengths`.
        args: the `TrainingArguments` of the run.

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
    """Orders indices so that each batch has rows of one kind and of similar length.

    Rows with images and text-only rows are each shuffled, cut into windows of many batches, sorted by length within a
    window, and cut into steps: one batch for each process, all of the same kind. Then the steps are shuffled. The step
    with the longest row comes first, so that an out-of-memory error appears in the first step. The order depends only
    on `seed` and the epoch, so a resumed run continues with the same rows.

    The sampler is meant for `Trainer`, or any loop with accelerate, which distributes the batches of a plain sampler to
    the processes in turn (`split_batches=False`). Call `dataloader.set_sampler(sampler)` once: accelerate needs it to
    set the epoch after a run on several processes is resumed.

    With one process the rows that fill no batch of their kind come last, mixed. With several, rows of each kind are
    repeated to fill the last step, at most `batch_size * num_processes - 1` of them, as accelerate and PyTorch's
    DistributedSampler do. With `drop_last` the remaining rows are left out instead, different ones each epoch.

    Args:
        lengths: tokens of each row, exact or approximate; None to group by kind alone.
        has_image: whether each row has an image; None if all rows are of one kind.
        batch_size: rows of a batch on one process.
        num_processes: number of processes that train together.
        seed: random seed of the order.
        drop_last: leave out rows instead of repeating some (or, with one process, instead of ending with a small
            batch).
        window: batches of all processes among which rows are sorted by length; a larger window pads less and shuffles
            less.

    Raises:
        ValueError: there are no rows, the arguments do not match, or `drop_last` leaves no complete step.
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
                f"{self.num_rows} rows do not fill a step of {num_processes} batches of {batch_size} rows of one kind, "
                "and drop_last drops incomplete steps. Use a smaller batch, or drop_last=False."
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next; accelerate and Trainer call this."""
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
        """Return the steps of the rows of one kind, (steps, rows of a step), and the remaining rows."""
        step = self.batch_size * self.num_processes
        whole = len(rows) // step * step
        rest = rows[whole:]
        if len(rest) and self.num_processes > 1 and not self.drop_last:
            rows = np.resize(rows, whole + step)
            whole, rest = len(rows), rows[:0]
        elif self.drop_last:
            rest = rows[:0]
        rows = rows[:whole]
        # One key for window and length (longest first): several times as fast as sorting twice.
        windows = np.arange(whole) // (self.window * step)
        rows = rows[np.argsort((windows << 32) - self.lengths[rows], kind="stable")]
        # Neighbours go to different processes, which balances their load.
        dealt = rows.reshape(-1, self.batch_size, self.num_processes).transpose(0, 2, 1)
        return dealt.reshape(-1, step), rest
