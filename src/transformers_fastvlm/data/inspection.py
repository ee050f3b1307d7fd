# SPDX-License-Identifier: Apache-2.0
"""What reading each row of a data set shows, with all of its images, by several processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from .collator import FastVLMDataCollator
from .row_fields import unread_keys
from .sample_errors import SampleError, shortened
from .samples import SampleDataset, parse_row

__all__ = ["Inspected", "inspect_rows"]

_ROWS_A_TASK = 32


@dataclass(frozen=True)
class Inspected:
    """What reading a row showed: an error, or its number of images and, with a collator, of tokens.

    `unread` are its keys that are not read.
    """

    error: SampleError | None = None
    num_images: int = 0
    num_tokens: int | None = None
    unread: tuple[str, ...] = ()


def inspect_rows(
    dataset: SampleDataset, collator: FastVLMDataCollator | None = None, num_workers: int = 0
) -> Iterator[Inspected]:
    """Yield what is found in each row, in order.

    Args:
        dataset: its images are decoded, but not kept.
        collator: counts tokens and says which rows it would refuse.
        num_workers: processes that read; 0 for this one alone.
    """
    loader = DataLoader(
        _Inspector(dataset, collator),
        batch_size=_ROWS_A_TASK if num_workers else 1,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # a data loader without one draws from the global random numbers
    )
    for rows in loader:
        yield from rows


class _Inspector(Dataset):
    """A data set of what inspecting each row shows."""

    def __init__(self, dataset: SampleDataset, collator: FastVLMDataCollator | None) -> None:
        self.dataset = dataset
        self.collator = collator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Inspected:
        place = self.dataset.place(index)
        unread: tuple[str, ...] = ()
        try:
            row, place = self.dataset.row(index)
            unread = tuple(shortened(key) for key in unread_keys(row))
            messages, sources = parse_row(row, place)
            images = self.dataset.image_folder(index)
            sizes = [images.size_of(source) for source in sources]
            tokens = None if self.collator is None else self.collator.measure(messages, sizes)
        except SampleError as error:
            return Inspected(error if error.place is not None else type(error)(error.reason, place), unread=unread)
        except (OSError, MemoryError):
            raise  # of the machine, not of the row
        except Exception as error:  # one row must not end the check, whatever is wrong with it
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return Inspected(SampleError(reason, place), unread=unread)
        return Inspected(None, len(sizes), tokens, unread)
