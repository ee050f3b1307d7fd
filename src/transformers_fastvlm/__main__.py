# SPDX-License-Identifier: Apache-2.0
"""`python -m transformers_fastvlm` is the command `fastvlm`, where that is not on the path."""

from .cli import main

main()
