# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes with captions, questions and exact answers: for training and testing tiny models.

Two numbers, a seed and an index, determine a scene, so a data set of any length needs no files and runs are
reproducible. The scenes cover the uses of FastVLM in miniature: objects and their positions, counting, reading numbers
and words, and a bar chart.
"""

from .content import KINDS, Mark, Question, Scene, make_collage, make_scene
from .dataset import SceneDataset
from .drawing import COLORS, SHAPES

__all__ = ["COLORS", "KINDS", "SHAPES", "Mark", "Question", "Scene", "SceneDataset", "make_collage", "make_scene"]
