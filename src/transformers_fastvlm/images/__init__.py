# SPDX-License-Identifier: Apache-2.0
"""Images: decoding files within bounds, reading every kind of input, resizing, and the arithmetic of AnyRes."""
