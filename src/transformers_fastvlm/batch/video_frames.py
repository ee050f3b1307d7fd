# SPDX-License-Identifier: Apache-2.0
"""Frames of videos, sampled at a fixed interval, as rows of a batch."""

import functools
import math
from collections.abc import Iterator

from ..data.sample_errors import shortened
from ..images.videos import VideoFrames, open_video, reason_of, require_av
from .requests import Request, SourceOptions, printable

__all__ = ["count_frames", "require_av", "video_requests"]


def count_frames(file: str, every: float) -> int | None:
    """Return the approximate number of a video's sampled frames, from its stated duration; None if it states none.

    A file that cannot be opened counts as 1, the row of its error.
    """
    av = require_av()
    try:
        with open_video(file) as container:
            stream = container.streams.video[0]
            if stream.duration is not None:
                seconds = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                seconds = container.duration / av.time_base
            else:
                return None
    except Exception:  # PyAV's errors have no common class
        return 1
    return max(1, math.ceil(seconds / every))


def video_requests(file: str, options: SourceOptions) -> Iterator[Request]:
    """Yield a request for each sampled frame of a video, and one with an error if it cannot be read."""
    source = printable(file)
    try:
        frames = VideoFrames(file, options.every, options.do_exif_transpose)
    except Exception as error:  # a damaged video must not end the run, and decoders raise any exception
        why = f"the video {shortened(file)} cannot be read: {reason_of(error)}"
        yield Request(source=source, question=options.prompt, file=file, error=why)
        return
    for position, seconds in enumerate(frames.times):
        opened = functools.partial(frames.frame, position)
        yield Request(source=source, question=options.prompt, open_image=opened, file=file, time=round(seconds, 3))
    if frames.damage:
        why = f"the video {shortened(file)} {frames.damage}"
        yield Request(source=source, question=options.prompt, file=file, error=why)
