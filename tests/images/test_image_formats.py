# SPDX-License-Identifier: Apache-2.0
"""Tests of what is read and what is refused: formats, damage, bounds on time and memory, faults of the machine."""

import contextlib
import errno
import io
import os
import re
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ways_in import WAYS

from transformers_fastvlm import FastVLMImageProcessorPil
from transformers_fastvlm.batch.opening import opened_ahead
from transformers_fastvlm.batch.requests import Request
from transformers_fastvlm.batch.sources import SourceOptions, find_sources
from transformers_fastvlm.data.image_files import ImageFolder
from transformers_fastvlm.data.sample_errors import ImageError
from transformers_fastvlm.images import reading
from transformers_fastvlm.images.decoding import is_machine_fault, load_pixels, read_stored
from transformers_fastvlm.images.formats import FORMATS, image_formats, image_suffixes
from transformers_fastvlm.images.reading import pil_to_rgb, read_image

SOURCE = Path(__file__).parents[2] / "src" / "transformers_fastvlm"


def noise(side: int = 48, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(format: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or noise()).save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*before: bytes, width: int = 8, height: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = zlib.compress(bytes(min(height, 1000) * (width + 1)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(width: int, height: int, strips: int, *more: tuple[int, int, int, int]) -> bytes:
    """An uncompressed gray TIFF of strips that all begin at the same byte, or with tags of its own."""
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 278: (4, 1, 1)}
    if not more:
        tags |= {273: (4, strips, 64), 279: (4, strips, 64 + 4 * strips)}
    tags |= {tag: rest for tag, *rest in more}
    arrays = struct.pack("<I", 8) * strips + struct.pack("<I", width) * strips
    head = b"II*\0" + struct.pack("<I", 64 + len(arrays)) + bytes(56) + arrays
    entries = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in sorted(tags.items()))
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg(scans: int, side: int = 48, **options: object) -> bytes:
    """A JPEG whose last scan is repeated until it has so many."""
    whole = saved("JPEG", noise(side), progressive=True, **options)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * (scans - whole.count(b"\xff\xda") + 1) + b"\xff\xd9"


def bmp_rle(size: int) -> bytes:
    body = b"\x01\x05" * (size // 2)
    header = struct.pack("<IiiHHIIiiII", 40, 4000, 1000, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + header + bytes(1024) + body


def gif(*blocks: bytes) -> bytes:
    whole = saved("GIF", noise(8, "P"))
    first = whole.index(b",", 13 + (3 << (whole[10] & 7) + 1))
    return whole[:first] + b"".join(blocks) + whole[first:]


# Formats


@pytest.mark.parametrize("way", WAYS)
def test_every_format_is_read_by_every_way_in(way: str, tmp_path: Path) -> None:
    for format in FORMATS:
        options = {"lossless": True} if format == "WEBP" else {}
        content = saved(format, noise(64, "P" if format == "GIF" else "RGB"), **options)
        path = tmp_path / f"a.{format.lower()}"
        path.write_bytes(content)
        found = WAYS[way](path, content, True)
        shown = found if isinstance(found, Image.Image) else Image.fromarray(np.asarray(found))
        assert shown.size == (64, 64), format
        if format not in ("JPEG", "AVIF", "GIF", "JPEG2000"):
            assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(noise(64))), format


REFUSED: dict[str, tuple[bytes, str]] = {
    "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(50), "is a HEIC .*pip install pillow-heif"),
    "film.png": (b"\0\0\0\x18ftypisom" + bytes(50), "is a video"),
    "page.png": (b"%PDF-1.7 ...", "is a PDF document. Render its pages"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", "is a PostScript drawing"),
    "drawing.png": (b"<?xml version='1.0'?>\n<svg></svg>", "is an SVG drawing"),
    "web.jpg": (b"\n<!DOCTYPE html><html></html>", "is a web page"),
    "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "zip.png": (b"PK\x03\x04" + bytes(40), "is a ZIP archive"),
    "gzip.png": (b"\x1f\x8b\x08" + bytes(40), "is compressed by gzip"),
    "icon.png": (saved("ICO"), "is an icon"),
    "icons.png": (saved("ICNS"), "is an icon"),
    "xpm.png": (b'/* XPM */ static char *a[] = {"1 1 1 1", "a c #000", "a"};', "is an XPM icon"),
    "dds.png": (b"DDS " + bytes(124), "is a DDS texture"),
    "tga.png": (saved("TGA"), "not an image of a supported format"),
    "pcx.png": (saved("PCX"), "not an image of a supported format"),
    "h5.png": (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
    "mac.png": (b"\x00\x05\x16\x07" + bytes(40), "a macOS metadata file"),
    "error.png": (b'{"error": "not found"}', "is JSON, such as"),
    "zeros.png": (bytes(5000), "begins with zero bytes only"),
    "text.png": (b"no picture at all", "not an image of a supported format"),
    "empty.png": (b"", "is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_named(name: str, tmp_path: Path) -> None:
    content, expected = REFUSED[name]
    if name == "photo.heic" and "HEIF" in image_formats():
        pytest.skip("pillow-heif is installed")
    path = tmp_path / name
    path.write_bytes(content)
    for way in (read_image, FastVLMImageProcessorPil(size=64)):
        with pytest.raises(ValueError, match=f"{name}.*{expected}"):
            way(path)
    with pytest.raises(ImageError, match=f"{name}.*{expected}"):
        ImageFolder(tmp_path).open(name)
    for way_in in ("standard input", "server", "batch", "demo"):
        with pytest.raises(Exception, match=expected):
            WAYS[way_in](path, content, True)


def test_nothing_else_opens_image_files() -> None:
    found = [
        f"{file.relative_to(SOURCE)}: {line.strip()}"
        for file in SOURCE.rglob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r"\bImage\.open\(|ImageFile\.Parser", line) and not re.search(r'Image\.open\("picture\.', line)
    ]
    assert found == ["images/decoding.py: return Image.open(file, formats=formats)"]


def test_folders_are_searched_for_the_formats_that_are_read(tmp_path: Path) -> None:
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".jp2"} <= {*suffixes}
    for name in ("a.png", "weights.h5", "b.hdf", "c.grib", "d.bufr", "e.wmf", "f.emf", "g.eps", "h.ico", "i.pdf"):
        (tmp_path / name).write_bytes(saved("PNG"))
    found = find_sources([str(tmp_path)], SourceOptions(prompt="?"))
    assert [Path(request.source).name for request in found] == ["a.png"]


# Damage


def damaged_avif() -> bytes:
    content = bytearray(saved("AVIF"))
    place = content.index(b"iloc")
    content[place : place + 4] = bytes(4)
    return bytes(content)


def damaged_pixels(format: str, place: int, **options: object) -> bytes:
    """A file whose head is good: Pillow opens it and finds the damage when it decodes."""
    content = bytearray(saved(format, **options))
    content[place : place + 8] = b"\xff" * 8
    with Image.open(io.BytesIO(content)) as image, pytest.raises((OSError, RuntimeError)):
        image.load()
    return bytes(content)


DAMAGED: dict[str, bytes] = {
    "avif": damaged_avif(),
    "avif whose colours are damaged": damaged_pixels("AVIF", 275),
    "webp whose pixels are damaged": damaged_pixels("WEBP", 1846),
    "lossless webp whose pixels are damaged": damaged_pixels("WEBP", 1949, lossless=True),
    "short png": png()[:40],
    "png of a wrong header": png().replace(b"\0\0\0\x08\0\0\0\x08\x08\0", b"\0\0\0\x08\0\0\0\x08\x07\0"),
    "short jpeg": saved("JPEG")[:700],
    "short gif": saved("GIF", noise(48, "P"))[:900],
    "short webp": saved("WEBP")[:300],
    "short bmp": saved("BMP")[:300],
    "short ppm": saved("PPM")[:300],
    "ppm of words": b"P3\n8 8\n255\none two three",
    "short tiff": saved("TIFF")[:300],
    "tiff without a page": b"II*\0\xff\xff\0\0" + bytes(16),
    "tiff with tags out of the file": tiff(8, 8, 8).replace(
        struct.pack("<HHII", 273, 4, 8, 64), struct.pack("<HHII", 273, 4, 9999, 64)
    ),
    "tiff of deflate": (lambda whole: whole[:100] + bytes(200) + whole[300:])(
        saved("TIFF", compression="tiff_deflate")
    ),
    "short jpeg 2000": saved("JPEG2000")[:200],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_a_value_error_with_the_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "it.png"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r"it\.png.*(damaged|not an image of a supported format)"):
        read_image(path)
    for use in (ImageFolder(tmp_path).open, ImageFolder(tmp_path).size_of):
        with pytest.raises(ImageError, match=r"it\.png"):
            use("it.png")
    for way_in in ("standard input", "server", "demo", "batch", "data URI"):
        with pytest.raises(Exception, match=r"damaged|not an image of a supported format"):
            WAYS[way_in](path, DAMAGED[name], True)


def error_of(content: bytes) -> ValueError | None:
    try:
        read_stored(io.BytesIO(content), "the file it.png")
    except ValueError as error:
        return error
    return None


def test_every_cut_and_many_changed_bytes_are_read_or_a_value_error() -> None:
    rng = np.random.default_rng(0)
    for format in FORMATS:
        whole = saved(format, noise(16, "P" if format == "GIF" else "RGB"))
        cuts = [whole[:length] for length in rng.integers(1, len(whole), 20)]
        for _ in range(60):
            changed = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 300), 3):
                changed[place] = rng.integers(0, 256)
            cuts.append(bytes(changed))
        for content in cuts:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                error = error_of(content)
                assert error is None or "it.png" in str(error)


CUT_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
WARNED_OF: dict[str, bytes] = {
    "JPEG with a cut EXIF block": saved("JPEG", exif=CUT_EXIF),
    "PNG with a cut EXIF block": saved("PNG", exif=CUT_EXIF),
    "TIFF with a tag out of the file": tiff(8, 8, 0, (258, 3, 3, 99999), (273, 4, 1, 64)),
    "JPEG with a broken list of further images": saved("JPEG", exif=b"").replace(
        b"\xff\xdb", b"\xff\xe2\0\x0eMPF\0II*\0\xff\0\0\0\xff\xdb", 1
    ),
    "PNG of many pixels": png(width=10_000, height=10_000),
}


@pytest.mark.parametrize("name", WARNED_OF)
def test_what_pillow_warns_of_is_not_printed(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with contextlib.suppress(Exception), Image.open(io.BytesIO(WARNED_OF[name])) as image:
            image.load()
            image.getexif()
    assert said, "Pillow itself warns of it"
    path = tmp_path / "it.png"
    path.write_bytes(WARNED_OF[name])
    for way in WAYS.values():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with contextlib.suppress(Exception):
                way(path, WARNED_OF[name], True)
        assert not [str(one.message) for one in said if "PIL" in one.filename]
    assert not re.search("warning|corrupt", capfd.readouterr().err, re.IGNORECASE)


# Bounds

COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "progressive JPEG of many scans": (lambda: jpeg(1500), "over 100 scans"),
    "large JPEG of too many scans for its pixels": (lambda: jpeg(70, 6000, quality=1), "over 55 scans"),
    "JPEG of many segments": (
        lambda: (lambda whole: whole[:2] + b"\xff\xe1\0\x0aExif\0\0xx" * 2000 + whole[2:])(saved("JPEG")),
        "over 1024 segments",
    ),
    "JPEG with megabytes between segments": (
        lambda: (lambda whole: whole[:20] + bytes(2**21) + whole[20:])(saved("JPEG")),
        "between its segments",
    ),
    "PNG of many chunks": (lambda: png(chunk(b"abCd", b"") * 150_000), "over 131072 chunks"),
    "GIF of many comments": (lambda: gif(b"!\xfe\x01x\0" * 5000), "over 1024 blocks of metadata"),
    "GIF of a long comment": (lambda: gif(b"!\xfe", b"\x01x" * 20_000, b"\0"), "over 8192 blocks of metadata"),
    "BMP that Python decodes": (lambda: bmp_rle(2**23 + 2), "run-length encoded BMP"),
    "PPM in text": (lambda: b"P3\n2000 2000\n255\n" + b"123 " * (2**21 + 1), "PPM in text"),
    "PPM of comments": (lambda: b"P3\n8 8\n255\n" + b"#x\n" * 100_000, "over 100 comments"),
    "PPM with a comment for a header": (lambda: b"P6\n#" + b"x" * 10**6, "header of over 65536 bytes"),
    "PPM of unusual values": (lambda: b"P6\n2000 2000\n254\n" + bytes(12_000_000), "unusual values"),
    "TIFF of many strips": (lambda: tiff(1, 200_000, 200_000), "200000 strips or tiles"),
    "TIFF of a huge tile": (
        lambda: tiff(8, 8, 0, (322, 4, 1, 40000), (323, 4, 1, 40000), (324, 4, 1, 8), (325, 4, 1, 64)),
        "tiles of 40000x40000",
    ),
    "JPEG 2000 of many bytes": (lambda: saved("JPEG2000") + bytes(2**25), "JPEG 2000 of"),
    "PNG of a long side": (lambda: png(width=2**21, height=1), "sides up to 1048576"),
    "PNG of many pixels": (lambda: png(width=10_000, height=10_000), "more than the limit of 89478485"),
    "PNG of more than Pillow opens": (lambda: png(width=20_000, height=20_000), "more than the limit of 89478485"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_would_cost_too_much_is_refused_before_it_does(name: str, tmp_path: Path) -> None:
    make, expected = COSTLY[name]
    path = tmp_path / "it.png"
    path.write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ValueError, match=rf"it\.png.*{expected}"):
        read_image(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 2
    with pytest.raises(ImageError, match=expected):
        ImageFolder(tmp_path).size_of("it.png")
    if name.startswith("progressive"):  # the caller's own image, too
        with Image.open(path) as image, pytest.raises(ValueError, match=expected):
            load_pixels(image)


def test_what_is_only_like_it_is_read() -> None:
    whole = saved("JPEG")
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    usual: dict[str, bytes] = {
        "JPEG of 90 scans": jpeg(90),
        "JPEG with a film behind": whole + scan * 500,
        "JPEG with scans in metadata": whole[:2] + b"\xff\xe3\x13\x8a" + scan * 500 + whole[2:],
        "JPEG of many restart markers": saved("JPEG", noise(640), restart_marker_blocks=1),
        "JPEG of one scan a component": saved("JPEG", noise(), progressive=True, quality=95),
        "PNG of many chunks": png(chunk(b"abCd", b"") * 1000),
        "GIF of some comments": gif(b"!\xfe\x01x\0" * 50),
        "TIFF of many strips": tiff(1, 4000, 4000),
        "PPM in text": b"P3\n8 8\n255\n# a comment\n" + b"123 " * 192,
        "16-bit PGM": b"P5\n8 8\n65535\n" + bytes(128),
    }
    for name, content in usual.items():
        assert read_stored(io.BytesIO(content), name).width > 0


def test_the_limit_of_pixels_can_be_raised_for_one_image(tmp_path: Path) -> None:
    for side in (10_000, 14_000):  # Pillow warns of the first and refuses the second
        Image.new("1", (side, side)).save(tmp_path / "large.png")
        image = read_image(tmp_path / "large.png", max_pixels=2 * 10**8)
        assert image.size == (side, side)
    assert Image.MAX_IMAGE_PIXELS == 89478485
    with pytest.raises(ValueError, match="more than the limit of 1000 "):
        read_stored(io.BytesIO(saved("PNG")), "it", max_pixels=1000)


# Values


def test_gray_values_of_sixteen_bits_are_the_same_in_every_format(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    files = {"PNG": saved("PNG", Image.fromarray(ramp)), "TIFF": saved("TIFF", Image.fromarray(ramp))}
    files["PPM"] = b"P5\n64 64\n65535\n" + ramp.astype(">u2").tobytes()
    expected = np.rint(ramp / 257).astype(np.uint8)
    for format, content in files.items():
        path = tmp_path / f"a.{format.lower()}"
        path.write_bytes(content)
        for name, way in WAYS.items():
            found = way(path, content, True)
            found = pil_to_rgb(found) if isinstance(found, Image.Image) else found
            assert np.array_equal(np.asarray(found)[..., 0], expected), (format, name)
        with Image.open(path) as image:  # the caller's own
            assert np.array_equal(np.asarray(pil_to_rgb(load_pixels(image)))[..., 0], expected)


def test_twelve_bits_in_sixteen_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(reading.logger, "warning_once", said.append)
    for greatest, warned in ((4095, True), (4096, False), (0, False)):
        said.clear()
        pil_to_rgb(Image.fromarray(np.full((8, 8), greatest, np.uint16)))
        assert bool(said) is warned
        assert not said or "12-bit camera" in said[0]


# The machine


def test_faults_of_the_machine_are_not_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it.png"
    path.write_bytes(saved("PNG"))
    faults: list[Exception] = [MemoryError(), *(OSError(code, os.strerror(code)) for code in (errno.EMFILE, errno.EIO))]
    for fault in faults:
        assert is_machine_fault(fault)

        class Failing(io.BytesIO):
            def read(self, *size: int, fault: Exception = fault) -> bytes:
                if self.tell() > 100:
                    raise fault
                return super().read(*size)

        with pytest.raises(type(fault)):
            read_stored(Failing(bytes(200)[:0] + saved("PNG") * 4), "it")
    for error in (OSError("cannot identify"), PermissionError(errno.EACCES, "no"), ValueError()):
        assert not is_machine_fault(error)


def test_no_memory_for_an_image_ends_a_run() -> None:
    """In a process of its own, which is allowed little memory."""
    program = """if True:
        import io, resource
        from PIL import Image
        from transformers_fastvlm.data.image_files import ImageFolder
        file = io.BytesIO()
        Image.new("L", (9000, 9000)).save(file, "PNG")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, -1))
        try:
            ImageFolder(None).open({"bytes": file.getvalue()})
        except MemoryError:
            print("MemoryError")
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("limits of memory are Linux's")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout == "MemoryError\n", done.stderr


def test_batch_ends_where_the_machine_fails() -> None:
    def broken() -> Image.Image:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        next(opened_ahead([[(0, Request(source="a.png", question="?", open_image=broken))]], None))


def test_text_in_place_of_images_is_said() -> None:
    for text in ("<image>\nHi", "What is in it?", "one two"):
        with pytest.raises(ValueError, match=r"The first argument is the images; pass a text as text="):
            read_image(text)
    with pytest.raises(ValueError, match=r"no image at 'my photo\.png'") as error:
        read_image("my photo.png")
    assert "text=" not in str(error.value)
