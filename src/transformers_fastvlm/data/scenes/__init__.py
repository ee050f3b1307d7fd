# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes with captions, questions and exact answers: for training and testing tiny models.

Every scene follows from two numbers, a seed and an index, so that a data set of any length needs no files and a run
can be repeated. The scenes hold what FastVLM is used for in miniature: objects and where they are, counting, reading
numbers and words, and a bar chart.
"""

from .content import KINDS, Question, Scene, make_scene
from .dataset import SceneDataset

__all__ = ["KINDS", "Question", "Scene", "SceneDataset", "make_scene"]
