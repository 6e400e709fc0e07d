"""Outputs of the reference implementations for the inputs that `fill.py` makes."""

from functools import cache
from pathlib import Path

import numpy as np


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of a golden file, such as "rankclip/metrics.npz"."""
    with np.load(Path(__file__).parent / name) as file:
        return dict(file)
