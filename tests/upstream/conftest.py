# SPDX-License-Identifier: Apache-2.0
"""Keep the project's own pytest away from modules that only work beside Transformers' test files."""

collect_ignore = ["overlay"]
