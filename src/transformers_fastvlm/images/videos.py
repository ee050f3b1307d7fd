# SPDX-License-Identifier: Apache-2.0
"""Frames of videos, decoded one by one on request: one per interval of time, or a number of evenly spaced ones."""

import bisect
import os
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .._optional import needs
from .bounds import check_dimensions
from .fetching import download

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["VideoFrames", "open_video", "reason_of", "require_av", "spread", "spread_frames"]

_FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"


def require_av() -> Any:
    """Return the module `av`.

    Raises:
        ImportError: it is not installed.
    """
    with needs("av", "A video", 'pip install "transformers-fastvlm[batch]"'):
        import av
    return av


def open_video(file: str) -> Any:
    """Return a file as a PyAV container.

    ffmpeg reads a name such as `10:30.mp4` as a URL, and some formats list other files. So the name gets the prefix
    "file:", and only video formats that refer to no other file are opened.

    Raises:
        Exception: any error of PyAV.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    return require_av().open(f"file:{file}", options=options)


def reason_of(error: BaseException) -> str:
    """Return an error's message on one line, with the class if the message alone may be unclear."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class _Index:
    """Times of a video's frames, and of its key frames, in units of its time base."""

    times: list[int]
    keys: list[int]
    unit: Fraction
    damage: str | None


class VideoFrames:
    """Frames of a video: one per interval, or a number of them, spread evenly from the first to the last.

    The packets of the file are listed without decoding them. A frame is decoded on request; the file stays open from
    the first to the last request. Not thread-safe.

    Args:
        file: path.
        every: interval in seconds; the frames are the first one, and the first at or after each multiple of `every`.
        count: number of frames, or all if the video has fewer; replaces `every`.
        do_exif_transpose: apply the rotation stored in the file, as players do.

    Attributes:
        times: times of the frames, in seconds from the first.
        damage: a description of what is missing at the video's end; None if nothing is.

    Raises:
        OSError, ValueError: the file is not a video, has only audio, is damaged, or its frames are too large.
    """

    def __init__(
        self, file: str, every: float | None = None, do_exif_transpose: bool = True, count: int | None = None
    ) -> None:
        self.file, self.do_exif_transpose = file, do_exif_transpose
        self._container: Any = None
        self._frames: Any = None
        self._at: int | None = None
        self._seekable = True
        index = _list_packets(file)
        self.damage = index.damage
        self._keys = index.keys
        first = index.times[0]
        self._wanted = (
            [index.times[position] for position in spread(len(index.times), count)]
            if count is not None
            else _at_multiples(index, Fraction(str(every)))  # the decimal value: 0.1 is exactly a tenth
        )
        self.times = [float((time - first) * index.unit) for time in self._wanted]

    def frame(self, position: int) -> "Image":
        """Return the frame `times[position]`.

        Raises:
            OSError, ValueError: it cannot be decoded.
        """
        wanted = self._wanted[position]
        try:
            frame = self._find(wanted)
        except Exception as error:
            self._close()
            raise ValueError(
                f"the frame at {self.times[position]:.3f} s cannot be decoded: {reason_of(error)}"
            ) from error
        image: Image = frame.to_image()
        turn = int(getattr(frame, "rotation", 0) or 0) if self.do_exif_transpose else 0
        if position == len(self._wanted) - 1:
            self._close()
        return image.rotate(turn, expand=True) if turn else image

    def _find(self, wanted: int) -> Any:
        """Return the first frame at or after a time."""
        if self._container is None:
            self._container = open_video(self.file)
            self._container.streams.video[0].thread_type = "AUTO"
            self._start()
        behind = self._at is None or wanted <= self._at
        key = self._keys[bisect.bisect_right(self._keys, wanted) - 1] if self._keys else None
        jumped = False
        if self._seekable and key is not None and (behind or self._at is None or key > self._at):
            self._container.seek(key, stream=self._container.streams.video[0])
            self._start()
            jumped = True
        elif behind and self._at is not None:
            self._close()
            return self._find(wanted)
        for frame in self._frames:
            if frame.pts is None:
                continue
            if jumped and frame.pts > wanted:
                # The file's index is wrong: read it from the start.
                self._seekable = False
                self._close()
                return self._find(wanted)
            jumped = False
            self._at = frame.pts
            if frame.pts >= wanted:
                return frame
        raise ValueError("the video ends before it.")

    def _start(self) -> None:
        self._frames, self._at = self._container.decode(video=0), None

    def _close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._frames = self._at = None


def _at_multiples(index: _Index, interval: Fraction) -> list[int]:
    """Return the times of the first frame and of the first at or after each multiple of `interval` seconds."""
    wanted: list[int] = []
    step = 0
    for time in index.times:
        seconds = (time - index.times[0]) * index.unit
        if seconds >= step * interval:
            wanted.append(time)
            step = int(seconds / interval) + 1
    return wanted


def _list_packets(file: str) -> _Index:
    """Return the times of a video's frames, without decoding them.

    Raises:
        OSError, ValueError: see `VideoFrames`.
    """
    times: list[int] = []
    keys: list[int] = []
    damage = None
    with open_video(file) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream, only audio.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("its codec is not supported.")
        check_dimensions(stream.codec_context.width, stream.codec_context.height, f"the video {file!r}")
        unit, stated = stream.time_base, stream.frames
        try:
            for packet in container.demux(stream):
                time = packet.dts if packet.pts is None else packet.pts
                if time is None or not packet.size or packet.is_discard:
                    continue
                times.append(time)
                if packet.is_keyframe:
                    keys.append(time)
        except Exception as error:
            damage = f"is damaged after {len(times)} frames: {reason_of(error)}"
    if not times:
        raise ValueError(damage or "it has no frames.")
    if damage is None and len(times) < stated * 0.99 - 1:
        damage = f"is truncated: it has {len(times)} of {stated} frames."
    return _Index(sorted(times), sorted(keys), unit, damage)


def spread(total: int, wanted: int) -> list[int]:
    """Return up to `wanted` indices below `total`, evenly spread from first to last; a single one is the middle."""
    if wanted >= total:
        return list(range(total))
    if wanted == 1:
        return [total // 2]
    return [round(index * (total - 1) / (wanted - 1)) for index in range(wanted)]


def spread_frames(video: str | os.PathLike[str], count: int) -> "list[Image]":
    """Return `count` frames of a video, or all if it has fewer, spread evenly from the first to the last.

    Args:
        video: a file, or an http(s) URL, which is fetched within the bounds of images.

    Raises:
        ImportError: PyAV is not installed.
        ConnectionError: the URL cannot be downloaded.
        ValueError: the file is missing, not a video, damaged or too large; the message names it.
    """
    name = os.fspath(video)
    require_av()
    if name[:8].lower().startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "video")
            with open(file, "wb") as stream:
                stream.write(download(name, "video"))
            return _spread_frames(file, count, name)
    if not os.path.isfile(name):
        raise ValueError(f"the video {name!r} does not exist or is not a file.")
    return _spread_frames(name, count, name)


def _spread_frames(file: str, count: int, shown: str) -> "list[Image]":
    try:
        frames = VideoFrames(file, count=count)
        if frames.damage:
            raise ValueError(frames.damage)
        return [frames.frame(position) for position in range(len(frames.times))]
    except Exception as error:  # PyAV's errors have no common class
        raise ValueError(f"the video {shown!r} cannot be read: {reason_of(error)}") from error
