# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes with captions, questions and exact answers: for training and testing tiny models.

Every scene follows from two numbers, a seed and an index, so that a data set of any length needs no files and a run
can be repeated. The scenes hold what FastVLM is used for in miniature: objects and where they are, counting, reading
numbers and words, and a bar chart.
"""

from .content import KINDS, Mark, Question, Scene, make_collage, make_scene
from .dataset import SceneDataset
from .drawing import COLORS, SHAPES

__all__ = ["COLORS", "KINDS", "SHAPES", "Mark", "Question", "Scene", "SceneDataset", "make_collage", "make_scene"]
