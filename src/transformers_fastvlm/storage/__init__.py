# SPDX-License-Identifier: Apache-2.0
"""Storage shared by the tools: atomic files and folders, journals, digests."""
