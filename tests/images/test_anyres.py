# SPDX-License-Identifier: Apache-2.0
"""Tests of the AnyRes arithmetic: resolutions, tiles, unpadding, token counts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from transformers_fastvlm.images.anyres import (
    best_resolution,
    check_pinpoints,
    fitted_size,
    num_image_tokens,
    num_tiles,
    tile_grid,
    unpadded_grid,
)

PINPOINTS = [[256, 512], [512, 256], [512, 512], [256, 768], [768, 256]]


@pytest.mark.parametrize("case", ["single0", "single1"])
def test_token_counts_equal_the_reference(golden: Path, case: str) -> None:
    config = json.loads((golden / "qwen2_anyres" / "config.json").read_text())
    expected = json.loads((golden / "qwen2_anyres" / "expected.json").read_text())[case]
    with Image.open(golden / "images" / expected["image"]) as image:
        size_hw = (image.height, image.width)
    tokens = num_image_tokens(size_hw, config["image_grid_pinpoints"], 256, config["mm_patch_merge_type"])
    assert tokens == expected["length"] - (len(expected["input_ids"]) - 1)


@pytest.mark.parametrize(
    ("size_hw", "best"),
    [
        ((236, 767), (256, 768)),
        ((754, 238), (768, 256)),
        ((500, 500), (512, 512)),
        # All pinpoints keep every pixel of a small square; the first of those that waste least wins.
        ((100, 100), (512, 256)),
        ((1, 1), (512, 256)),
        ((4000, 4000), (512, 512)),
    ],
)
def test_best_resolution(size_hw: tuple[int, int], best: tuple[int, int]) -> None:
    assert best_resolution(size_hw, PINPOINTS) == best


def test_first_of_two_equal_resolutions_wins() -> None:
    assert best_resolution((100, 100), [[256, 512], [512, 256]]) == (512, 256)
    assert best_resolution((100, 100), [[512, 256], [256, 512]]) == (256, 512)


def test_a_line_that_keeps_no_pixel_still_has_a_resolution() -> None:
    assert best_resolution((1, 100_000), PINPOINTS) == (512, 256)


def test_fitted_size_rounds_the_shorter_side_up() -> None:
    assert fitted_size((236, 767), (256, 768)) == (237, 768)
    assert fitted_size((754, 238), (768, 256)) == (768, 243)
    assert fitted_size((1, 100_000), (256, 512)) == (1, 512)


def test_tiles_count_the_base_view() -> None:
    assert tile_grid((500, 500), PINPOINTS, 256) == (2, 2)
    assert num_tiles((500, 500), PINPOINTS, 256) == 5
    assert num_tiles((500, 500), None, 256) == 1


def test_unpadded_grid_cuts_both_sides_equally() -> None:
    assert unpadded_grid((512, 512), 8, 8) == (0, 0, 8, 8)
    assert unpadded_grid((256, 512), 8, 8) == (2, 0, 4, 8)
    assert unpadded_grid((512, 256), 8, 8) == (0, 2, 8, 4)
    # int(8 * 300 / 512) = 4 of 8 rows show the image; of 3 rows of 8 an odd one stays.
    assert unpadded_grid((300, 512), 8, 8) == (2, 0, 4, 8)
    assert unpadded_grid((200, 512), 8, 8) == (2, 0, 4, 8)
    assert unpadded_grid((1, 1000), 8, 8) == (4, 0, 0, 8)


def test_merge_types() -> None:
    assert num_image_tokens((500, 500), PINPOINTS, 256, "flat") == 5 * 16
    assert num_image_tokens((500, 500), PINPOINTS, 256, "spatial") == 5 * 16
    assert num_image_tokens((500, 500), PINPOINTS, 256, "spatial_unpad") == 16 + 8 * 9
    assert num_image_tokens((1, 100_000), [[512, 512]], 256, "spatial_unpad") == 16
    assert [num_image_tokens((7, 9), None, size) for size in (256, 512, 768, 1024, 1536)] == [16, 64, 144, 256, 576]
    assert num_image_tokens((7, 9), None, (128, 192), "spatial_unpad") == 6
    assert num_image_tokens((2000, 2000), [[2048, 2048]], 1024) == 1280


def test_pinpoints_as_text() -> None:
    assert check_pinpoints("[[256, 512], (512, 256)]", 256) == [[256, 512], [512, 256]]


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        (None, "non-empty list"),
        ([], "non-empty list"),
        ("256x512", r"\[width, height\] pairs"),
        ([[256]], "two positive integers"),
        ([[256, 0]], "two positive integers"),
        ([[256, 512.5]], "two positive integers"),
        ([[256, 300]], "not a multiple of the tile size"),
    ],
)
def test_bad_pinpoints(pinpoints: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pinpoints(pinpoints, 256)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_resolution((0, 5), PINPOINTS)
    with pytest.raises(ValueError, match="at least one"):
        best_resolution((5, 5), [])
    with pytest.raises(ValueError, match="multiples of 64"):
        num_image_tokens((5, 5), None, 100)
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'average'"):
        num_image_tokens((5, 5), None, 256, "average")
