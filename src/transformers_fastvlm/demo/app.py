# SPDX-License-Identifier: Apache-2.0
"""The page: its server, its style, and its security limits."""

import html
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ..engines import Engine
from .answering import Answerer
from .camera_tab import camera_tab
from .chat_tab import chat_tab
from .page_images import MAX_UPLOAD_BYTES
from .presets import GENERAL, SCENES, scene_examples
from .visitors import MAX_VISITORS, Visitors

__all__ = ["Page", "check_gradio"]

_UPLOADS_KEPT = (600, 4 * 3600)  # seconds: how often to look, and how old an uploaded file may get


def check_gradio() -> None:
    """Raise ImportError, with installation advice, if Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError(
            'The web page needs Gradio, which is not installed. Run: pip install "transformers-fastvlm[demo]"'
        )


class Page:
    """A web page to ask a model about images. It is a context manager; leaving it stops the server.

    Everything that the page needs comes from its own server. Uploaded files are stored in a temporary folder that is
    removed at the end; its name is in the environment (GRADIO_TEMP_DIR), so a process can have one page at a time.

    Args:
        engine: the model; the caller closes it.
        name: name of the checkpoint, shown on the page.
        notice: licence notice shown on the page.
        scenes: whether the model knows drawn scenes only; the page then offers such images and matching questions.
        system: system message in place of the chat template's own.
        max_new_tokens: maximum number of tokens of an answer.
        temperature: 0 for greedy decoding, which repeats the same answer to a question; above 0 samples.

    Attributes:
        answerer: asks the engine.
        visitors: the visitors of the page.

    Raises:
        ImportError: Gradio is not installed.

    Example:
        >>> with Page(engine, name="mine") as page:  # doctest: +SKIP
        ...     print(page.start())
        ...     input("Enter ends it. ")
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        notice: str | None = None,
        scenes: bool = False,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        check_gradio()
        self._folder = tempfile.TemporaryDirectory(prefix="fastvlm-page-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name).resolve()
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
        self._folder_before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read all the time
        blocks = _blocks_class()
        import gradio as gr

        self.answerer = Answerer(engine, max_new_tokens, temperature)
        self.visitors = Visitors(self.answerer)
        presets, examples = (SCENES, scene_examples(folder)) if scenes else (GENERAL, [])
        with blocks(title="FastVLM", analytics_enabled=False, delete_cache=_UPLOADS_KEPT, fill_width=False) as page:
            gr.HTML(f"<h1>FastVLM</h1><p>{html.escape(name)}</p>", elem_id="head", padding=False)
            with gr.Tab("Ask about images"):
                chat_tab(self.answerer, self.visitors, presets, examples, folder, system)
            with gr.Tab("Live camera"):
                camera_tab(self.answerer, self.visitors, presets, system)
            if notice:
                gr.HTML(f"<p>{html.escape(notice)}</p>", elem_id="notice", padding=False)

            async def come(request: gr.Request) -> None:
                self.visitors.come(str(request.session_hash))

            async def leave(request: gr.Request) -> None:
                self.visitors.leave(str(request.session_hash))

            page.load(come, queue=False, api_visibility="private")
            page.unload(leave)
        self._page = page

    def start(self, host: str = "127.0.0.1", port: int | None = None) -> str:
        """Start the server and return the page's URL.

        Args:
            host: address to listen on; "0.0.0.0" accepts connections from other machines.
            port: None for the first free one from 7860 on.

        Raises:
            OSError: the port is taken.
        """
        import gradio as gr

        _, url, _ = self._page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            max_file_size=MAX_UPLOAD_BYTES,
            state_session_capacity=2 * MAX_VISITORS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css_paths=Path(__file__).with_name("page.css"),
        )
        return str(url)

    def close(self) -> None:
        """Stop the server and all answers, and remove all uploads."""
        for session in list(self.visitors):
            self.visitors.leave(session)
        self._page.close(verbose=False)
        self.answerer.close()
        os.environ.pop("GRADIO_TEMP_DIR", None)
        if self._folder_before is not None:
            os.environ["GRADIO_TEMP_DIR"] = self._folder_before
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _blocks_class() -> Any:
    """Return Gradio's container of a page, changed so that it never downloads files that a request names.

    Gradio would download a file from a URL in a (forged) request.
    """
    import gradio as gr

    class Blocks(gr.Blocks):
        async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            if any("://" in path for path in _paths(inputs)):
                raise gr.Error("Upload images; URLs are not downloaded.", print_exception=False)
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

    return Blocks


def _paths(value: Any) -> Iterator[str]:
    """Yield the values of all keys "path" at any depth of a request."""
    if isinstance(value, dict):
        if "path" in value:
            yield str(value["path"])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)
