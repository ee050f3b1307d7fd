# SPDX-License-Identifier: Apache-2.0
"""The licence of a checkpoint's weights, determined by its name and its files."""

import re
from collections.abc import Iterable

__all__ = ["APPLES", "RESEARCH_ONLY", "may_be_apples", "stated_licence"]

APPLES = "apple-amlr"
RESEARCH_ONLY = f"for research only, not for commercial use, and so is everything derived from them ({APPLES})"
"""The licence terms of Apple's weights, for messages."""


def may_be_apples(licence: str | None, widths: Iterable[int]) -> bool:
    """Return whether weights are Apple's, or could be: no licence is stated, and the encoder has the published widths.

    Args:
        licence: the result of `stated_licence`.
        widths: widths of the encoder's five stages, `hidden_sizes` of its configuration.
    """
    from ..configuration_fastvlm import PUBLISHED_WIDTHS  # this imports torch

    return licence == APPLES or (licence is None and tuple(widths) == PUBLISHED_WIDTHS)


def stated_licence(name: str, texts: Iterable[str], card: str | None) -> str | None:
    """Return the licence by its name on the Hugging Face hub, "apple-amlr" for Apple's; None if none is stated.

    Args:
        name: name of the checkpoint; Apple's are in `apple/`.
        texts: texts of its licence files, read if the name does not decide.
        card: its README.md, or None.
    """
    if name.startswith("apple/") or any("Apple Machine Learning Research Model" in text for text in texts):
        return APPLES
    header = re.match(r"---\n(.*?)\n---", card or "", re.DOTALL)
    pattern = r"^(license(?:_name)?):[ \t]*(\S.*?)[ \t]*$"
    entries = dict(re.findall(pattern, header.group(1) if header else "", re.MULTILINE))
    found = entries.get("license_name") or entries.get("license")
    return found.strip("'\"") if found else None
