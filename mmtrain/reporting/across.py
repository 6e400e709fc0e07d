"""Figures that put runs beside reported points, which each paper's room draws in its own way."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mmtrain.reporting.results import RunGroup


def draw_across(groups: Sequence[RunGroup], folder: Path) -> list[dict[str, str]]:
    """Draw what the rooms of the groups' papers make of them into `<folder>/figures`.

    A room that has such figures has a `gallery.across_runs(groups, folder)`. Runs of laptop scale are not drawn.

    Returns:
        `{"file": path in the folder, "title": ..., "kind": "figure"}` for each.
    """
    groups = [group for group in groups if group.scale == "full"]
    drawn = []
    for paper in dict.fromkeys(group.paper for group in groups):
        room = f"mmtrain.{paper}"
        if importlib.util.find_spec(room) and importlib.util.find_spec(f"{room}.gallery"):
            drawn += importlib.import_module(f"{room}.gallery").across_runs(groups, folder)
    return drawn
