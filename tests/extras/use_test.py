# SPDX-License-Identifier: Apache-2.0
"""The extra test: what the suite imports by name."""

import accelerate  # noqa: F401
import parameterized  # noqa: F401
import pytest  # noqa: F401
import xdist  # noqa: F401
