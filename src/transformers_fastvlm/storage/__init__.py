# SPDX-License-Identifier: Apache-2.0
"""What the tools keep on the disk: one way to write files and folders, one journal, one digest."""
