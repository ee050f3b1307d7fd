# SPDX-License-Identifier: Apache-2.0
"""Values, other than the defaults, for arguments that every configuration takes (not in source distributions)."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["FastVLMForConditionalGeneration"],
    "id2label": {0: "first", 1: "second"},
    "label2id": {"first": 0, "second": 1},
    "problem_type": "regression",
}
