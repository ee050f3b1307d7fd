# SPDX-License-Identifier: Apache-2.0
"""A web page to ask about pictures, with live captions of a camera; `fastvlm demo` shows it."""

from .app import Page, check_gradio

__all__ = ["Page", "check_gradio"]
