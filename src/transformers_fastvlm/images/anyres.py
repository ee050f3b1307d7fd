# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of AnyRes, LLaVA-NeXT's dynamic resolution: the tiles and the tokens of an image.

The image processors use it to cut tiles, the processor to count placeholders and the model to stitch features, so the
three always agree. Pure Python integers and floats. Image and grid sizes are (height, width); pinpoints are pairs of
**width, height**, as in checkpoints.

An image becomes a base view (the whole image, squeezed into one tile), followed by the tiles of its best resolution in
reading order.
"""

import ast
import math
from collections.abc import Sequence
from typing import Any

__all__ = [
    "STRIDE",
    "best_resolution",
    "check_pinpoints",
    "fitted_size",
    "num_image_tokens",
    "num_tiles",
    "scaled_pinpoints",
    "tile_grid",
    "unpadded_grid",
]

STRIDE = 64
"""Pixels of the input per token along each axis."""

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def _check_size(size_hw: Sequence[int], what: str = "image size") -> tuple[int, int]:
    height, width = (int(side) for side in size_hw)
    if height < 1 or width < 1:
        raise ValueError(f"{what} (height, width) is ({height}, {width}); both sides must be at least 1.")
    return height, width


def check_pinpoints(pinpoints: Any, tile_size: int | Sequence[int] | None = None) -> list[list[int]]:
    """Return `pinpoints` as a list of [width, height], checked.

    Args:
        pinpoints: pairs of (width, height) in pixels, or such a list as text, as in some checkpoints.
        tile_size: side of a square tile, or its (height, width); if given, pinpoints must be multiples of it.

    Raises:
        ValueError: no pinpoints, an entry that is not a pair of positive integers, or not a multiple of the tile.
    """
    if isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"image_grid_pinpoints is the text {pinpoints!r}; expected a list of [width, height] pairs."
            ) from error
    if not isinstance(pinpoints, list | tuple) or not pinpoints:
        raise ValueError(
            f"image_grid_pinpoints is {pinpoints!r}; AnyRes needs a non-empty list of [width, height] pairs in pixels."
        )
    checked = []
    for point in pinpoints:
        is_pair = isinstance(point, list | tuple) and len(point) == 2
        if not is_pair or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in point):
            raise ValueError(
                f"image_grid_pinpoints contains {point!r}; expected [width, height], two positive integers."
            )
        checked.append([point[0], point[1]])
    if tile_size is not None:
        tile_h, tile_w = _tile(tile_size)
        for width, height in checked:
            if width % tile_w or height % tile_h:
                raise ValueError(
                    f"image_grid_pinpoints contains [{width}, {height}] (width, height), which is not a multiple of "
                    f"the tile size {tile_w}x{tile_h}; choose multiples of the tile size, or another size."
                )
    return checked


def scaled_pinpoints(pinpoints: Sequence[Sequence[int]], own: int, size: int) -> list[list[int]]:
    """Return `pinpoints` scaled from the checkpoint's tile size `own` to `size`: the grids keep their numbers of tiles.

    Pass them to the image processor together with another size; the model stitches the features accordingly.
    """
    return [[width * size // own, height * size // own] for width, height in pinpoints]


def _tile(tile_size: int | Sequence[int]) -> tuple[int, int]:
    return (tile_size, tile_size) if isinstance(tile_size, int) else _check_size(tile_size, "tile size")


def best_resolution(size_hw: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the (height, width) among `pinpoints` that keeps the most detail; ties go to the least padding, the first.

    Detail is the number of pixels of the image fitted inside, at most those of the image.

    Args:
        size_hw: (height, width) of the image.
        pinpoints: pairs of (width, height).
    """
    image_h, image_w = _check_size(size_hw)
    best: tuple[int, int] | None = None
    best_rank = (0, 0)
    for width, height in pinpoints:
        scale = min(width / image_w, height / image_h)
        kept = min(int(image_w * scale) * int(image_h * scale), image_w * image_h)
        rank = (kept, kept - width * height)
        if best is None or rank > best_rank:
            best, best_rank = (int(height), int(width)), rank
    if best is None:
        raise ValueError("image_grid_pinpoints is empty; AnyRes needs at least one [width, height] pair.")
    return best


def fitted_size(size_hw: Sequence[int], target_hw: Sequence[int]) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit inside `target_hw`, the shorter side rounded up.

    The rest of the target is black, half of it on either side.
    """
    image_h, image_w = _check_size(size_hw)
    target_h, target_w = _check_size(target_hw, "target size")
    scale_h, scale_w = target_h / image_h, target_w / image_w
    if scale_w < scale_h:
        return min(math.ceil(image_h * scale_w), target_h), target_w
    return target_h, min(math.ceil(image_w * scale_h), target_w)


def tile_grid(
    size_hw: Sequence[int], pinpoints: Sequence[Sequence[int]], tile_size: int | Sequence[int]
) -> tuple[int, int]:
    """Return the (rows, columns) of tiles of an image at its best resolution, without the base view."""
    tile_h, tile_w = _tile(tile_size)
    height, width = best_resolution(size_hw, pinpoints)
    return height // tile_h, width // tile_w


def num_tiles(size_hw: Sequence[int], pinpoints: Sequence[Sequence[int]] | None, tile_size: int | Sequence[int]) -> int:
    """Return the number of tiles of an image of `size_hw`, base view included; 1 without pinpoints."""
    if not pinpoints:
        _check_size(size_hw)
        return 1
    rows, columns = tile_grid(size_hw, pinpoints, tile_size)
    return 1 + rows * columns


def unpadded_grid(size_hw: Sequence[int], grid_h: int, grid_w: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the part of a feature grid without the image's black border.

    The border is cut equally on both sides; an odd row or column is kept. An image so long that it covers less than one
    cell across an even grid keeps no cells (height or width 0): only its base view remains.

    Args:
        size_hw: (height, width) of the image.
        grid_h, grid_w: cells of the stitched grid of all tiles.
    """
    image_h, image_w = _check_size(size_hw)
    _check_size((grid_h, grid_w), "feature grid")
    if image_w / image_h > grid_w / grid_h:
        border = (grid_h - int(image_h * (grid_w / image_w))) // 2
        return border, 0, grid_h - 2 * border, grid_w
    border = (grid_w - int(image_w * (grid_h / image_h))) // 2
    return 0, border, grid_h, grid_w - 2 * border


def num_image_tokens(
    size_hw: Sequence[int],
    pinpoints: Sequence[Sequence[int]] | None,
    tile_size: int | Sequence[int],
    merge_type: str = "flat",
) -> int:
    """Return the number of tokens of one image.

    The base view's tokens come first. "flat" and "spatial" keep every token of every tile and differ only in their
    order. "spatial_unpad" drops the tokens of the black border and ends each remaining row of the stitched grid with
    one learned newline. Without pinpoints an image is one view, and the merge type has no effect.

    Args:
        size_hw: (height, width) of the image, before any resizing.
        pinpoints: pairs of (width, height), or None if the image is not tiled ("pad", "square").
        tile_size: side of a tile, or its (height, width); multiples of 64.
        merge_type: "flat", "spatial" or "spatial_unpad".

    Raises:
        ValueError: an unknown merge type, a size below 1, or a tile size that is not a multiple of 64.
    """
    if merge_type not in MERGE_TYPES:
        raise ValueError(f"mm_patch_merge_type is {merge_type!r}; expected one of {', '.join(map(repr, MERGE_TYPES))}.")
    tile_h, tile_w = _tile(tile_size)
    if tile_h < 1 or tile_w < 1 or tile_h % STRIDE or tile_w % STRIDE:
        raise ValueError(
            f"tile size (height, width) is ({tile_h}, {tile_w}); both must be positive multiples of {STRIDE}."
        )
    rows, columns = tile_h // STRIDE, tile_w // STRIDE
    base = rows * columns
    if not pinpoints:
        _check_size(size_hw)
        return base
    tiles_h, tiles_w = tile_grid(size_hw, pinpoints, (tile_h, tile_w))
    if merge_type != "spatial_unpad":
        return base * (1 + tiles_h * tiles_w)
    _, _, height, width = unpadded_grid(size_hw, tiles_h * rows, tiles_w * columns)
    return base + height * (width + 1)
