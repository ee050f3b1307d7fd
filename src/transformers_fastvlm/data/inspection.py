# SPDX-License-Identifier: Apache-2.0
"""Inspection of every row of a data set, with all of its images, by several processes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from .collator import FastVLMDataCollator
from .row_fields import unread_keys
from .sample_errors import SampleError, shortened
from .samples import SampleDataset, parse_row

__all__ = ["Inspected", "inspect_rows"]

_ROWS_A_TASK = 32


@dataclass(frozen=True)
class Inspected:
    """The result for a row: an error, or its number of images and, with a collator, its number of tokens.

    `unread` holds the keys that are not read.
    """

    error: SampleError | None = None
    num_images: int = 0
    num_tokens: int | None = None
    unread: tuple[str, ...] = ()


def inspect_rows(
    dataset: SampleDataset, collator: FastVLMDataCollator | None = None, num_workers: int = 0
) -> Iterator[Inspected]:
    """Yield the result of each row, in order.

    Args:
        dataset: the samples; images are decoded, but not kept.
        collator: counts tokens and detects rows that it would refuse.
        num_workers: number of worker processes; 0 reads in this process.
    """
    loader: DataLoader[Any] = DataLoader(
        range(len(dataset)),  # type: ignore[arg-type]
        batch_size=_ROWS_A_TASK if num_workers else 1,
        num_workers=num_workers,
        collate_fn=functools.partial(_inspect_all, dataset, collator),
        generator=torch.Generator(),  # without it a data loader draws from the global generator
    )
    for rows in loader:
        yield from rows


def _inspect_all(dataset: SampleDataset, collator: FastVLMDataCollator | None, rows: list[int]) -> list[Inspected]:
    return [_inspect(dataset, collator, row) for row in rows]


def _inspect(dataset: SampleDataset, collator: FastVLMDataCollator | None, index: int) -> Inspected:
    place = dataset.place(index)
    unread: tuple[str, ...] = ()
    try:
        row, place = dataset.row(index)
        unread = tuple(shortened(key) for key in unread_keys(row))
        messages, sources = parse_row(row, place)
        images = dataset.image_folder(index)
        sizes = [images.size_of(source) for source in sources]
        tokens = None if collator is None else collator.measure(messages, sizes)
    except SampleError as error:
        return Inspected(error if error.place is not None else type(error)(error.reason, place), unread=unread)
    except (OSError, MemoryError):
        raise  # a problem of the machine, not of the row
    except Exception as error:  # one bad row must not end the check
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Inspected(SampleError(reason, place), unread=unread)
    return Inspected(None, len(sizes), tokens, unread)
