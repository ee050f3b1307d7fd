# SPDX-License-Identifier: Apache-2.0
"""The supported image formats, and descriptions of files in other formats."""

import functools
import importlib.util
from collections.abc import Iterable

from PIL import Image

__all__ = ["advice_about", "describe", "image_formats", "image_suffixes"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
"""Supported formats, in Pillow's names.

Formats for which Pillow calls another program (EPS), uses slow or rarely used decoders, or decodes an image within the
image (ICO, ICNS) are excluded: each is an attack surface for untrusted files.
"""

HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

_CONVERT = "Convert it to PNG or JPEG."
_UNPACK = "Unpack it and give the images in it."
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF", "a PDF document", "Render its pages to PNG, as with: pdftoppm -png file.pdf page"),
    (b"%!PS", "a PostScript drawing, which is a program", "Render it to PNG."),
    (b"\xc5\xd0\xd3\xc6", "a PostScript drawing (EPS), which is a program", "Render it to PNG."),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "Fetch the files: git lfs pull"),
    (b"\x00\x05\x16\x07", "a macOS metadata file (._NAME), not the image", "Leave it out."),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (b"PK\x03\x04", "a ZIP archive, or a document in one", _UNPACK),
    (b"BZh", "compressed by bzip2", _UNPACK),
    (b"\xfd7zXZ", "compressed by xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x89HDF", "an HDF5 file", "Write its images as PNG."),
    (b"PAR1", "a Parquet file", "Read it as a table, not as an image."),
    (b"\x93NUMPY", "a NumPy array", "Load it with numpy.load and pass the array."),
    (b"8BPS", "a Photoshop document", _CONVERT),
    (b"\x00\x00\x01\x00", "an icon (ICO)", _CONVERT),
    (b"icns", "an icon (ICNS)", _CONVERT),
    (b"DDS ", "a DDS texture", _CONVERT),
    (b"/* XPM", "an XPM icon, which is C source", _CONVERT),
    (b"gimp xcf", "a GIMP document", _CONVERT),
    (b"qoif", "a QOI image", _CONVERT),
    (b"\x76\x2f\x31\x01", "an OpenEXR image", _CONVERT),
    (b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image", _CONVERT),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)", "Take frames of it, as `fastvlm batch` does."),
)
_MARKUP = (
    (b"<svg", "an SVG drawing", "Render it to PNG."),
    (
        b"<!doctype html",
        "a web page (HTML)",
        "Use the URL of the image itself.",
    ),
    (b"<html", "a web page (HTML)", "Use the URL of the image itself."),
    (b"<?xml", "an XML document", "Give an image instead."),
)


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return the supported formats, in Pillow's names, with HEIF if pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return FORMATS
    import pillow_heif

    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the lower-case suffixes of files that are treated as images in a folder."""
    formats = image_formats()
    Image.init()
    known = tuple(suffix for suffix, format in Image.registered_extensions().items() if format in formats)
    return (*known, ".mpo")


def advice_about(suffixes: Iterable[str]) -> str:
    """Return what to install for files of these suffixes, after a colon; "" if nothing would help."""
    needs_heif = any(suffix in HEIF_SUFFIXES for suffix in suffixes) and "HEIF" not in image_formats()
    return ": pip install pillow-heif reads HEIC" if needs_heif else ""


def describe(head: bytes) -> str | None:
    """Return what a file of another format is, by its first bytes, and what to do; None if unknown."""
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIF_BRANDS and "HEIF" in image_formats():
            return "is a damaged HEIC (HEIF) image."
        if head[8:12] in _HEIF_BRANDS:
            return "is a HEIC (HEIF) image. Install its decoder: pip install pillow-heif"
        if head[8:12] in (b"avif", b"avis"):
            return "is an AVIF image, which this build of Pillow cannot decode. Update it: pip install -U pillow"
        return "is a video (MP4 or QuickTime). Take frames of it, as `fastvlm batch` does."
    if head[:4] == b"RIFF" and head[8:12] != b"WEBP":
        return "is audio or video (RIFF). Take frames of it, as `fastvlm batch` does."
    for beginning, kind, advice in _BEGINNINGS:
        if head.startswith(beginning):
            return f"is {kind}. {advice}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind, advice in _MARKUP:
        if text.startswith(beginning) or (beginning == b"<svg" and text.startswith(b"<?xml") and beginning in text):
            return f"is {kind}. {advice}"
    if text[:1] in (b"{", b"["):
        return "is JSON, such as a service's error message. Give an image instead."
    if head and not head.strip(b"\0"):
        return "begins with zero bytes only, as after an interrupted copy. Copy it again."
    return None
