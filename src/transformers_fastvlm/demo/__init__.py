# SPDX-License-Identifier: Apache-2.0
"""A web page to ask about images, with live captions of a camera; see `fastvlm demo`."""

from .app import Page, check_gradio

__all__ = ["Page", "check_gradio"]
