# SPDX-License-Identifier: Apache-2.0
"""Serving: answers over HTTP, in a web page, for many files, and through vLLM."""
