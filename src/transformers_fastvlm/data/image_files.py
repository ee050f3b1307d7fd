# SPDX-License-Identifier: Apache-2.0
"""The images of rows: looked up only below their folder, opened, and checked.

Data sets are untrusted. Their paths must not lead out of the folder that the user named, their URLs are not fetched,
and an image that cannot be decoded is an error.
"""

import io
import os
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..images.base64_images import from_base64
from ..images.decoding import load_pixels, load_stored, open_image, read_stored, stands_on_its_side
from ..images.read_options import ReadOptions
from ..images.reading import as_shown, open_file, pil_to_rgb
from .folders import is_within
from .sample_errors import ImageError, SampleError, shortened

__all__ = ["ImageFolder", "image_bytes"]

_UNUSUAL_MODES = ("I", "F")


class ImageFolder:
    """Opens the images that rows name.

    A source is a path relative to the folder (or an absolute path inside it), a Pillow image, or Hugging Face's
    `{"bytes": …, "path": …}`, whose bytes are used if present.

    Args:
        folder: the folder of the images; None where the rows hold the images themselves.
        follow_symlinks: allow links that lead out of the folder. The folder itself may always be a link.
        reading: how images are read.

    Raises:
        NotADirectoryError: the folder does not exist.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        follow_symlinks: bool = False,
        reading: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    ) -> None:
        if folder is not None and not os.path.isdir(folder):
            raise NotADirectoryError(
                f"the image folder {os.fspath(folder)!r} is not a folder; expected the folder of the images."
            )
        self.folder = None if folder is None else Path(os.path.abspath(folder))
        self._real = None if folder is None else os.path.realpath(folder)
        self.follow_symlinks, self.reading = follow_symlinks, reading

    def open(self, source: Any) -> Image.Image:
        """Return a decoded image in its own mode, or RGB if it was transparent, without an EXIF orientation.

        Raises:
            ImageError: the image is missing or cannot be decoded.
            SampleError: its path leads out of the folder or is a URL.
        """
        if isinstance(source, Image.Image):
            with _errors():
                return _checked(
                    as_shown(load_pixels(source, max_pixels=self.reading.max_pixels), self.reading), "the image"
                )
        file, what = self._file_of(source)
        with _errors(), file:
            return _checked(as_shown(read_stored(file, what, self.reading.max_pixels), self.reading), what)

    def size_of(self, source: Any) -> tuple[int, int]:
        """Return the height and width that `open` gives, after decoding the whole image to detect damage.

        JPEG is decoded at an eighth of its size, which still reads every byte and is several times as fast.
        """
        if isinstance(source, Image.Image):
            return self.open(source).size[::-1]
        file, what = self._file_of(source)
        with _errors(), file, open_image(file, what, self.reading.max_pixels) as image:
            width, height = image.size
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            drafted = image.size != (width, height)
            stored = _checked(load_stored(image, what, self.reading.max_pixels), what)
            if not drafted:
                width, height = stored.size  # before decoding, Pillow reports a TIFF file's upright size
            turned = self.reading.do_exif_transpose and stands_on_its_side(stored)
            return (width, height) if turned else (height, width)

    def path_of(self, source: Any) -> str | None:
        """Return the path of an image's file; None if it has no file, or the file may not be opened."""
        if isinstance(source, Mapping):
            source = source.get("path") if source.get("bytes") is None else None
        if not isinstance(source, str | os.PathLike):
            return None
        try:
            return self._path_of(os.fspath(source))
        except SampleError:
            return None

    def _file_of(self, source: Any) -> tuple[Any, str]:
        """Return an opened file, and its name in error messages."""
        if isinstance(source, Mapping) and set(source) <= {"bytes", "path"}:
            content, name = source.get("bytes"), source.get("path")
            if content is not None:
                what = "the image" if name is None else f"the image {shortened(name)}"
                return io.BytesIO(image_bytes(content, what)), what
            source = name
        if not isinstance(source, str | os.PathLike):
            raise SampleError(
                f"an image is {shortened(source)} ({type(source).__name__}); expected a path, a Pillow image, or an "
                "object with 'bytes' or 'path'."
            )
        path, what = self._path_of(os.fspath(source)), f"the image {shortened(os.fspath(source))}"
        if not os.path.isfile(path):
            how = "is a folder" if os.path.isdir(path) else "does not exist"
            raise ImageError(
                f"{what} {how}: expected a file at {shortened(path)}. {_other_name(path)}Check the image folder, "
                f"{str(self.folder)!r}."
            )
        with _errors():
            return open_file(path, what), what

    def _path_of(self, name: str) -> str:
        """Return the path of a name, after checking that it lies in the folder."""
        if "://" in name or name.startswith("data:"):
            raise SampleError(
                f"the image {shortened(name)} is a URL; URLs are not fetched. Download the images into a folder and "
                "use their paths in it."
            )
        if self.folder is None or self._real is None:
            raise SampleError(
                f"the image {shortened(name)} is a path, but no image folder was given; pass image_folder."
            )
        if not name or "\0" in name or not _can_name_a_file(name):
            raise SampleError(f"the image path {shortened(name)} is {'empty' if not name else 'not valid'}.")
        path = os.path.normpath(os.path.join(self.folder, name))
        inside = is_within(path, str(self.folder))
        if inside and not self.follow_symlinks:
            real = os.path.realpath(path)
            if not is_within(real, self._real):
                raise SampleError(
                    f"the image {shortened(name)} leaves the image folder {str(self.folder)!r} by a symbolic link, to "
                    f"{real!r}. Name a folder that holds both, or allow it with follow_symlinks=True if you made the "
                    "link."
                )
        elif not inside:
            raise SampleError(
                f"the image {shortened(name)} leaves the image folder {str(self.folder)!r}. Paths are relative to it "
                "and stay in it; put the image there, or name a folder further up."
            )
        return path


def _can_name_a_file(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _other_name(path: str) -> str:
    """Return a sentence that names the file that was probably meant; empty if there is none."""
    forms = {"with / for \\": path.replace("\\", "/")} if os.sep == "/" else {}
    forms |= {"with composed accents": unicodedata.normalize("NFC", path)}
    forms |= {"with decomposed accents": unicodedata.normalize("NFD", path)}
    how = next((how for how, name in forms.items() if name != path and os.path.isfile(name)), None)
    return "" if how is None else f"It exists under the same name written {how}. "


def image_bytes(content: Any, what: str) -> bytes:
    """Return the bytes of an image; in JSON they are base64.

    Raises:
        ImageError: the bytes have another type, are not base64, or are empty.
    """
    if isinstance(content, str):
        try:
            content = from_base64(content)
        except ValueError as error:
            raise ImageError(f"{what} has text as its bytes that is not base64: {error}.") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise ImageError(f"{what} has a {type(content).__name__} as its bytes; expected bytes, or base64 in JSON.")
    if not content:
        raise ImageError(f"{what} is empty (0 bytes).")
    return bytes(content)


def _checked(image: Image.Image, what: str) -> Image.Image:
    """Return a decoded image, after checking that its values fit into 8 bits."""
    if image.mode in _UNUSUAL_MODES:
        try:
            pil_to_rgb(image)
        except ValueError as error:
            raise ImageError(f"{what}: {error}") from error
    return image


@contextmanager
def _errors() -> Iterator[None]:
    """Turn a ValueError into ImageError."""
    try:
        yield
    except SampleError:
        raise
    except ValueError as error:
        raise ImageError(str(error)) from error
