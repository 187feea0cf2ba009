"""Confidences and windows that the tests of the budget and of routing share."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from consumers.budget import Window

confidences = st.none() | st.sampled_from([0.0, 0.5, 0.85, 1.0]) | st.floats(0, 1, allow_nan=False)


def beta_confidences(count, seed=1):
    draw = random.Random(seed)
    return [draw.betavariate(4, 2) for _ in range(count)]


def full_window():
    window = Window()
    for value in beta_confidences(250):
        window.add(value, is_must_review=False)
    return window
