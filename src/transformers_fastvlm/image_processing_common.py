# SPDX-License-Identifier: Apache-2.0
"""Shared code of the Pillow and the torchvision image processor: options, their checks, reading input, and loading.

The two differ only in how they resize pixels. Saved files name the torchvision class, as in Transformers; the
registration decides which of the two the Auto classes then build.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

from PIL import Image
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict, is_valid_image
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torch_available

from .configuration_fastvlm import FastViTHDConfig, FastVLMConfig, is_flat, nested_from_flat
from .images import reading
from .images.anyres import STRIDE, check_pinpoints, num_image_tokens, num_tiles
from .images.read_options import WHITE, as_colour

ASPECT_RATIOS = ("pad", "square", "anyres")
MIN_SIZE, MAX_SIZE = 64, 2048

_TYPES = ("FastVLMImageProcessor", "FastVLMImageProcessorPil")
_UNUSED_OPTIONS = ("do_center_crop", "crop_size", "do_pad", "pad_size")


class FastVLMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    r"""Options of the FastVLM image processors beyond those of every image processor.

    image_aspect_ratio (`str`):
        How an image is made square: "pad" (black borders), "square" (centre crop) or "anyres" (a base view and tiles).
    image_grid_pinpoints (`list[list[int]]`):
        For "anyres": the resolutions to choose from, as pairs of width and height.
    do_exif_transpose (`bool`):
        Whether to apply an image's EXIF orientation, as `transformers.image_utils.load_image` does. True by default;
        False takes the pixels as stored, as the reference does.
    alpha_background (`list[int]` or `str`):
        Background colour for transparent images: red, green and blue from 0 to 255, or a name. White by default; None
        drops alpha and shows the colours beneath, as the reference does.
    max_pixels (`int`):
        Maximum pixels of a file; `PIL.Image.MAX_IMAGE_PIXELS` if None.
    """

    image_aspect_ratio: str | None
    image_grid_pinpoints: list[Any] | tuple[Any, ...] | str | None
    do_exif_transpose: bool | None
    alpha_background: list[int] | tuple[int, ...] | str | None
    max_pixels: int | None


class FastVLMImageProcessorMixin:
    """The shared half of both image processors, which does not compute pixels."""

    valid_kwargs = FastVLMImageProcessorKwargs

    resample = PILImageResampling.BICUBIC
    image_mean = [0.0, 0.0, 0.0]
    image_std = [1.0, 1.0, 1.0]
    size = {"height": 1024, "width": 1024}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_exif_transpose = True
    alpha_background: Any = WHITE
    max_pixels: int | None = None
    image_aspect_ratio = "pad"
    image_grid_pinpoints = None

    _prepares_in_parallel = False
    """Whether `process_image` may run in threads, which do not inherit the caller's torch streams and modes."""

    @property
    def model_input_names(self) -> list[str]:
        """Names of the outputs of a call."""
        tiled = self.image_aspect_ratio == "anyres"
        return ["pixel_values", "image_sizes", "num_tiles"] if tiled else ["pixel_values"]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Return the number of tiles (rows of `pixel_values`) of an image of this height and width."""
        options = self._options(images_kwargs)
        if options["image_aspect_ratio"] != "anyres":
            return num_tiles((height, width), None, MIN_SIZE)
        return num_tiles((height, width), options["image_grid_pinpoints"], options["size"].height)

    def get_number_of_image_tokens(
        self, height: int, width: int, merge_type: str = "flat", images_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Return the number of tokens of an image of this height and width.

        Args:
            height, width: of the image after its EXIF orientation is applied.
            merge_type: the model's `mm_patch_merge_type`.
            images_kwargs: options of the call, such as `size`, that replace this processor's.
        """
        options = self._options(images_kwargs)
        if not options["do_resize"]:
            check_unresized(height, width)
            return num_image_tokens((height, width), None, (height, width), merge_type)
        pinpoints = options["image_grid_pinpoints"] if options["image_aspect_ratio"] == "anyres" else None
        return num_image_tokens((height, width), pinpoints, options["size"].height, merge_type)

    def _options(self, images_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        names = ("size", "do_resize", "image_aspect_ratio", "image_grid_pinpoints")
        given = {name: value for name, value in (images_kwargs or {}).items() if name in names}
        return self._standardize_kwargs(**{name: getattr(self, name) for name in names} | given)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Normalise and check the options of a call or of the constructor.

        Raises:
            ValueError: an unsupported option, an invalid value, or two options that contradict each other.
        """
        kwargs.setdefault("default_to_square", True)
        for name in ("size", "image_aspect_ratio"):
            if kwargs.get(name) is None:
                own = getattr(self, name, None)
                kwargs[name] = deepcopy(getattr(type(self), name) if own is None else own)
        options = super()._standardize_kwargs(**kwargs)  # type: ignore[misc]
        for name in _UNUSED_OPTIONS:
            if options.get(name):
                raise ValueError(
                    f"{name}={options[name]!r} is not an option of FastVLM's image processor. Use image_aspect_ratio "
                    "('pad', 'square' or 'anyres') to make images square, and `size` for the side in pixels."
                )
        if options.get("data_format") not in (None, ChannelDimension.FIRST, ChannelDimension.FIRST.value):
            raise ValueError(f"data_format is {options['data_format']!r}; FastVLM takes 'channels_first' only.")
        if "alpha_background" in options:
            options["alpha_background"] = as_colour(options["alpha_background"])
        check_size(options["size"])
        mode = options["image_aspect_ratio"]
        if mode not in ASPECT_RATIOS:
            raise ValueError(f"image_aspect_ratio is {mode!r}; expected one of {', '.join(map(repr, ASPECT_RATIOS))}.")
        pinpoints = options.get("image_grid_pinpoints")
        if mode == "anyres":
            if not options.get("do_resize", True):
                raise ValueError("do_resize=False contradicts image_aspect_ratio='anyres', which resizes into tiles.")
            options["image_grid_pinpoints"] = check_pinpoints(pinpoints, options["size"].height)
        elif pinpoints:
            options["image_grid_pinpoints"] = check_pinpoints(pinpoints)
        return options

    def fetch_images(self, image_url_or_urls: Any, max_pixels: int | None = None) -> Any:
        """Read paths, URLs and base64 in lists of any nesting; return images unchanged.

        A file keeps its mode and its EXIF orientation, which `process_image` applies. An array of two axes gets a
        channel axis. Several files are read in parallel.
        """
        max_pixels = self.max_pixels if max_pixels is None else max_pixels
        if isinstance(image_url_or_urls, list | tuple):
            leaves = list(_leaves(image_url_or_urls))
            to_read = sum(isinstance(leaf, str | os.PathLike) for leaf in leaves)
            fetched = iter(in_parallel(lambda leaf: self.fetch_images(leaf, max_pixels), leaves, to_read))
            return _refilled(image_url_or_urls, fetched)
        if isinstance(image_url_or_urls, str | os.PathLike):
            return reading.read_image(image_url_or_urls, max_pixels)
        if is_valid_image(image_url_or_urls):
            if not isinstance(image_url_or_urls, Image.Image) and image_url_or_urls.ndim == 2:
                return image_url_or_urls[..., None]
            return image_url_or_urls
        raise TypeError(
            f"an image is {type(image_url_or_urls).__name__}; expected a Pillow image, a numpy array, a torch tensor, "
            "a path, an http(s) URL, base64 text, or a list of these."
        )

    def _prepare_images_structure(
        self, images: Any, expected_ndims: int = 3, max_pixels: int | None = None
    ) -> list[Any]:
        """Flatten lists of any nesting, and arrays with a batch axis, to a list of images."""
        flat = _flatten(self.fetch_images(images, max_pixels), expected_ndims)
        if not flat:
            raise ValueError("there are no images to process; omit `images` for text only.")
        return flat

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list[Any]:
        """Prepare each image with `process_image`; an error names the image's index."""
        flat = self._prepare_images_structure(images, expected_ndims, kwargs.get("max_pixels"))

        def prepare(index: int) -> Any:
            try:
                return self.process_image(flat[index], *args, **kwargs)  # type: ignore[attr-defined]
            except ValueError as error:
                if len(flat) == 1:
                    raise
                raise ValueError(f"image {index} (counting from 0) of {len(flat)}: {error}") from error

        threads = len(flat) if self._prepares_in_parallel and _independent(flat) else 1
        return in_parallel(prepare, range(len(flat)), threads)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the options from preprocessor_config.json or processor_config.json, or else from config.json.

        Apple's checkpoints have a config.json only. If the preprocessor file belongs to another class of image
        processor, as in exports for other tools, FastVLM's config.json is used instead.

        Raises:
            OSError: none of these files exists.
            ValueError: the files describe another model, for instance a LLaVA with another vision tower.
        """
        name = pretrained_model_name_or_path
        found: dict[str, Any] = {}
        reason: OSError | None = None
        try:
            found, rest = super().get_image_processor_dict(name, **kwargs)  # type: ignore[misc]
        except OSError as error:
            reason = error
        if found.get("image_processor_type") in _TYPES:
            return found, rest
        kwargs.pop("image_processor_filename", None)
        try:
            config, rest = PreTrainedConfig.get_config_dict(name, **kwargs)
        except OSError as error:
            config, reason = {}, error
        if not found and not config:
            raise OSError(
                f"cannot read a preprocessor_config.json or config.json of {str(name)!r}; expected a local folder or a "
                f"repository with one of them. {reason}"
            ) from reason
        if config.get("model_type") not in _MODEL_TYPES:
            described = found.get("image_processor_type")
            raise ValueError(
                f"{str(name)!r} is not a FastVLM checkpoint: its image processor is {described!r} and its model_type "
                f"{config.get('model_type')!r}; expected model_type {', '.join(map(repr, _MODEL_TYPES))}. Load it with "
                "its own class."
            )
        return options_from_config(config), rest


_MODEL_TYPES = (FastVLMConfig.model_type, FastViTHDConfig.model_type, "llava_qwen2", "llava_llama")


def options_from_config(config: FastVLMConfig | FastViTHDConfig | dict[str, Any]) -> dict[str, Any]:
    """Return the image processor options that follow from a model's configuration, in either form.

    Raises:
        ValueError: not a FastVLM configuration, for instance a LLaVA with another vision tower.
    """
    model: Any = config
    if isinstance(config, dict):
        nested = nested_from_flat(config) if is_flat(config) else config
        kind = FastViTHDConfig if nested.get("model_type") == FastViTHDConfig.model_type else FastVLMConfig
        model = kind.from_dict(nested)
    if isinstance(model, FastViTHDConfig):
        return {"size": {"height": model.image_size, "width": model.image_size}}
    side = model.vision_config.image_size
    options = {"size": {"height": side, "width": side}, "image_aspect_ratio": model.image_aspect_ratio}
    if model.image_grid_pinpoints:
        options["image_grid_pinpoints"] = model.image_grid_pinpoints
    return options


def check_size(size: SizeDict) -> None:
    """Raise ValueError unless `size` is a square that the encoder accepts: a multiple of 64 from 64 to 2048."""
    sides = dict(size)
    valid = set(sides) == {"height", "width"} and sides["height"] == sides["width"]
    if not valid or sides["height"] % STRIDE or not MIN_SIZE <= sides["height"] <= MAX_SIZE:
        raise ValueError(
            f"size is {sides}; expected one number, or equal 'height' and 'width', a multiple of {STRIDE} from "
            f"{MIN_SIZE} to {MAX_SIZE}. For another shape resize the images yourself and pass do_resize=False."
        )


def check_unresized(height: int, width: int) -> None:
    """Raise ValueError unless an image can be used with `do_resize=False`."""
    if height % STRIDE or width % STRIDE:
        raise ValueError(
            f"an image is {width}x{height} (width x height); with do_resize=False both sides must be multiples of "
            f"{STRIDE}."
        )


def check_one_shape(shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError unless all prepared images of a batch have the same number of channels, height and width."""
    if len(set(shapes)) > 1:
        raise ValueError(
            f"the images of this batch have {len(set(shapes))} different shapes (channels, height, width): "
            f"{sorted(set(shapes))}. Pass them one by one, or leave do_resize and do_convert_rgb at True."
        )


def per_channel(values: Any, channels: int, name: str) -> list[float]:
    """Return `values` as one number per channel; a single number applies to all."""
    numbers = [float(values)] * channels if isinstance(values, int | float) else [float(value) for value in values]
    if len(numbers) != channels:
        raise ValueError(f"{name} has {len(numbers)} values, but the images have {channels} channels.")
    if name == "image_std" and 0 in numbers:
        raise ValueError(f"image_std is {numbers}; expected numbers other than 0.")
    return numbers


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any], most: int | None = None) -> list[Any]:
    """Return `function` of each item, in order; raise the error of the first item that fails.

    Pillow releases Python's global lock while it decodes and resizes, so threads help: at most `most`, the number of
    CPUs and `torch.get_num_threads()` (set by OMP_NUM_THREADS; 1 in the workers of a DataLoader).
    """
    threads = min(len(items), len(items) if most is None else most)
    if threads > 1:
        threads = min(threads, _cpus())
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def _cpus() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if is_torch_available():
        import torch

        cpus = min(cpus, torch.get_num_threads())
    return cpus


def _independent(images: Sequence[Any]) -> bool:
    """Whether threads may read these images in parallel.

    They may if no image occurs twice, and no image still to be decoded shares an open file with another, as the
    members of a tar archive do.
    """
    files = [getattr(image, "fp", None) for image in images]
    own = all(file is None or type(file) in (io.BytesIO, io.BufferedReader) for file in files)
    held = {id(image if file is None else file) for image, file in zip(images, files, strict=True)}
    return own and len(held) == len(images)


def _leaves(nested: Any) -> Iterator[Any]:
    """Yield the elements of lists of any nesting, in order."""
    if isinstance(nested, list | tuple):
        for item in nested:
            yield from _leaves(item)
    else:
        yield nested


def _refilled(nested: Any, leaves: Iterator[Any]) -> Any:
    """Return lists with the nesting of `nested` and the elements of `leaves`."""
    return [_refilled(item, leaves) for item in nested] if isinstance(nested, list | tuple) else next(leaves)


def _flatten(images: Any, ndims: int) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item, ndims)]
    if not isinstance(images, Image.Image) and images.ndim == ndims + 1:
        return list(images)
    return [images]
