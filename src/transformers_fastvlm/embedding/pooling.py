# SPDX-License-Identifier: Apache-2.0
"""One vector from the states of all tokens."""

import torch
from torch import Tensor

__all__ = ["pool"]


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return one vector for each row, wherever its padding is.

    Args:
        hidden: (batch, length, hidden_size), states of the tokens.
        attention_mask: (batch, length), 1 for tokens and 0 for padding on either side; each row has a token.
        pooling: "last" for the state of the last token, which has seen all others; "mean" for the mean of all tokens.

    Returns:
        (batch, hidden_size), float32.
    """
    if pooling == "mean":
        weights = attention_mask.unsqueeze(-1).float()
        # Not by multiplication: states of padding may be infinite.
        total = hidden.float().masked_fill(weights == 0, 0.0).sum(1)
        return total / weights.sum(1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
