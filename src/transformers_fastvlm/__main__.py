# SPDX-License-Identifier: Apache-2.0
"""`python -m transformers_fastvlm` runs the command `fastvlm`, also where that is not on the PATH."""

from .cli import main

main()
