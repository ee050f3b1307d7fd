# SPDX-License-Identifier: Apache-2.0
"""The page's second tab: camera captions, with the time to the first token."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from .answering import Answerer, UnusableInput
from .chat_tab import problem
from .page_images import read_frame
from .presets import Preset
from .visitors import MAX_QUESTION, Visitors

__all__ = ["CAPTION_TOKENS", "camera_tab"]

CAPTION_TOKENS = 64
_SECONDS_BETWEEN_FRAMES = 0.25
_LONGEST_SECONDS = 3600.0  # of answering, before the camera has to be started again


def camera_tab(answerer: Answerer, visitors: Visitors, presets: Sequence[Preset], system: str | None) -> None:
    """Add the tab to the page that is being built.

    The browser sends a frame every quarter of a second. One that arrives while another is answered replaces the one
    that waits, so that the next caption is about the newest frame; nothing queues up.

    Args:
        answerer: the model.
        visitors: the visitors of the page.
        presets: questions with buttons; the first is asked until another is chosen.
        system: system message in place of the chat template's own.
    """
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=280):
            camera = gr.Image(
                label="Camera",
                elem_id="camera",
                sources=["webcam"],
                streaming=True,
                height="min(45vh, 24rem)",
                webcam_options=gr.WebcamOptions(
                    mirror=False,
                    constraints={"video": {"width": {"ideal": 640}, "facingMode": {"ideal": "environment"}}},
                ),
            )
        with gr.Column(min_width=280):
            caption = gr.Textbox(label="Caption", elem_id="caption", lines=3, interactive=False)
            timing = gr.HTML("", elem_id="timing", padding=False)
            prompt = gr.Textbox(
                presets[0].question,
                label="Asked about each frame",
                elem_id="camera-prompt",
                max_lines=3,
                max_length=MAX_QUESTION,
            )
            with gr.Row(elem_id="camera-presets"):
                buttons = [gr.Button(preset.label, size="sm", min_width=72) for preset in presets]

    async def see(frame: Any, question: str, request: gr.Request) -> Any:
        started = time.perf_counter()
        if frame is None:
            return gr.skip(), gr.skip()
        try:
            visitor = visitors.of(str(request.session_hash))
            if visitor.caption is not None and not visitor.caption.done:
                return gr.skip(), gr.skip()
            if len(question) > MAX_QUESTION:
                raise UnusableInput(f"The question has {len(question)} characters; up to {MAX_QUESTION} can be asked.")
            image = await asyncio.to_thread(read_frame, frame)
            text = {"type": "text", "text": question.strip() or presets[0].question}
            messages = [{"role": "user", "content": [{"type": "image", "image": image}, text]}]
            opening = [] if system is None else [{"role": "system", "content": system}]
            visitor.caption = reply = answerer.ask([*opening, *messages], CAPTION_TOKENS, started)
            async for _ in reply:
                pass
        except Exception as error:
            return "", problem(error)
        if reply.first_token_seconds is None:
            return gr.skip(), gr.skip()
        told = f"First token after <strong>{reply.first_token_seconds * 1000:.0f} ms</strong>"
        return reply.text, f"<p>{told}</p>"

    event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    camera.stream(
        see,
        [camera, prompt],
        [caption, timing],
        stream_every=_SECONDS_BETWEEN_FRAMES,
        time_limit=_LONGEST_SECONDS,
        concurrency_limit=None,
        preprocess=False,
        **event,
    )
    for button, preset in zip(buttons, presets, strict=True):
        button.click(lambda question=preset.question: question, None, prompt, queue=False, **event)
