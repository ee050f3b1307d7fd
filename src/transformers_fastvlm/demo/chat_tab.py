# SPDX-License-Identifier: Apache-2.0
"""The page's first tab: a conversation about one or more images."""

import contextlib
import html
import logging
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .answering import Answerer, UnusableInput
from .page_images import save_small
from .presets import Example, Preset
from .visitors import Visitor, Visitors, summary, turn

__all__ = ["chat_tab", "problem"]

_WELCOME = "Drop, paste or choose an image below and ask about it.<br>Several images go together in one question."
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])")
_logger = logging.getLogger(__name__)


def problem(error: Exception) -> str:
    """Return the page's message for an error, as HTML; an error that is not the visitor's fault is also logged."""
    if isinstance(error, UnusableInput):
        message = str(error)
    elif type(error).__name__ == "OutOfMemoryError":
        message = "The model ran out of memory. Send fewer images, or start a new conversation."
    else:
        message = "The model failed. See the output of fastvlm demo for the error."
        _logger.error("the model failed", exc_info=error)
    return f'<p role="alert">{html.escape(message)}</p>'


def _told(line: str) -> str:
    return f'<p role="status">{line}</p>'


def _literal(shown: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages that the chat shows as they are written.

    Gradio's chat renders HTML even where Markdown is off, and fetches the images that it names. Only what a browser
    would read as HTML is escaped, because the copy button copies what is sent.
    """
    return [
        {**one, "content": _MARKUP.sub(lambda found: html.escape(found[0]), one["content"])}
        if isinstance(one["content"], str)
        else one
        for one in shown
    ]


def chat_tab(
    answerer: Answerer,
    visitors: Visitors,
    presets: Sequence[Preset],
    examples: Sequence[Example],
    folder: Path,
    system: str | None,
) -> None:
    """Add the tab to the page that is being built.

    Args:
        answerer: the model.
        visitors: the visitors of the page.
        presets: questions with buttons; the first is also asked about an image without a question.
        examples: shown where there is no conversation yet.
        folder: for small copies of images.
        system: system message in place of the chat template's own.
    """
    import gradio as gr

    chat = gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="conversation",
        height="max(17rem, calc(100dvh - 24rem))",
        buttons=["copy"],
        # Answers are untrusted (an image can tell the model what to write), so never render them as HTML.
        render_markdown=False,
        latex_delimiters=[],
        allow_tags=False,
        feedback_options=None,
        placeholder=_WELCOME,
        examples=[{"text": one.question, "icon": str(one.image), "display_text": one.question} for one in examples]
        or None,
    )
    status = gr.HTML(_told(""), elem_id="status", padding=False)
    with gr.Row(elem_id="presets"):
        buttons = [gr.Button(preset.label, size="sm", min_width=72) for preset in presets]
        fresh = gr.Button("New conversation", size="sm", min_width=72, elem_id="new")
    box = gr.MultimodalTextbox(
        label="Your question",
        show_label=False,
        elem_id="question",
        placeholder="Ask about the image",
        sources=["upload"],
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=100_000,
    )
    outputs = [chat, box, status, *buttons]

    def small_image(image: Image.Image, words: str) -> Any:
        return gr.Image(
            str(save_small(image, folder)),
            alt_text=words,
            buttons=["fullscreen"],
            show_label=False,
            container=False,
            render=False,
        )

    def controls(waiting: bool) -> dict[Any, Any]:
        return {button: gr.update(interactive=not waiting) for button in buttons}

    async def answer(
        question: str, files: Sequence[str], given: dict[str, Any], left: str, session: str
    ) -> AsyncIterator[dict[Any, Any]]:
        """Yield updates of the page while a question is answered.

        The box then holds the text `left`, or `given`, what it held before, if the question cannot be answered.
        """
        visitor: Visitor | None = None
        try:
            visitor = visitors.of(session)
            first = True
            async for _ in turn(answerer, visitor, question, files, small_image, system):
                changes: dict[Any, Any] = {chat: _literal(visitor.shown)}
                if first:
                    emptied = gr.update(value={"text": left, "files": []}, submit_btn=False, stop_btn=True)
                    changes |= {box: emptied, status: _told(""), **controls(waiting=True)}
                    first = False
                yield changes
        except Exception as error:
            if visitor is not None and visitor.waits:  # an earlier question is still being answered
                yield {status: problem(error)}
                return
            restored = gr.update(value=given, submit_btn=True, stop_btn=False)
            changes = {} if visitor is None else {chat: _literal(visitor.shown)}
            yield {**changes, box: restored, status: problem(error), **controls(waiting=False)}
            return
        line = _told(summary(visitor.reply) if visitor.reply is not None and visitor.shown else "")
        ready = gr.update(submit_btn=True, stop_btn=False)
        yield {chat: _literal(visitor.shown), box: ready, status: line, **controls(waiting=False)}

    async def ask(value: dict[str, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        question, files = (value["text"] or "").strip(), value["files"]
        if not question and not files:
            yield {status: problem(UnusableInput("There is no question yet. Type one, or add an image."))}
            return
        question = question or presets[0].question
        async for changes in answer(question, files, value, "", str(request.session_hash)):
            yield changes

    def asks(preset: Preset) -> Any:
        async def ask_preset(value: dict[str, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            session, files = str(request.session_hash), value["files"]
            try:
                if not files and not visitors.of(session).messages:
                    raise UnusableInput("There is no image yet. Drop, paste or choose one, then ask.")
            except UnusableInput as error:
                yield {status: problem(error)}
                return
            async for changes in answer(preset.question, files, value, value["text"], session):
                yield changes

        return ask_preset

    async def ask_example(chosen: gr.SelectData, request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        example = examples[chosen.index]
        nothing = {"text": "", "files": []}
        session = str(request.session_hash)
        async for changes in answer(example.question, [str(example.image)], nothing, "", session):
            yield changes

    async def stop(request: gr.Request) -> None:
        with contextlib.suppress(UnusableInput):  # gone, and all of it stopped
            visitors.of(str(request.session_hash)).stop()

    async def start_over(request: gr.Request) -> Any:
        visitors.come(str(request.session_hash))
        return [], {"text": "", "files": []}, _told("")

    event: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    answering: dict[str, Any] = {**event, "outputs": outputs, "concurrency_limit": None}
    box.submit(ask, box, **answering)
    for button, preset in zip(buttons, presets, strict=True):
        button.click(asks(preset), box, **answering)
    if examples:
        chat.example_select(ask_example, None, **answering)
    box.stop(stop, None, None, queue=False, **event)
    for leaving in (fresh.click, chat.clear):
        leaving(start_over, None, [chat, box, status], queue=False, **event)
