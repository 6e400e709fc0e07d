"""Claims of a paper that `reproduce` tested, read from the file it leaves above its run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmtrain import reported
from mmtrain.config_errors import UserError
from mmtrain.reported import as_reported
from mmtrain.reporting.tables import FRACTIONS

FILE = "reproduce.json"
KEYS = ("claim", "metric", "rival", "ours", "theirs", "difference", "verdict")
COLOURS = {"holds": "better", "does not hold": "worse"}  # any other verdict has none


def read_claims(path: Path) -> dict[str, Any]:
    """Read `reproduce.json`; its values are as logged, so fractions and not percent.

    Raises:
        UserError: the file cannot be read, or a claim lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for claim in content["claims"]:
            for key in KEYS:
                claim[key]
            [float(value) for value in (claim["ours"], claim["theirs"], claim["difference"]["mean"])]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as claims ({type(error).__name__}: {error})\n"
            f"expected what `python -m mmtrain reproduce` writes: claims, each with {', '.join(KEYS)}"
        ) from error
    return content


def claims_values(content: dict[str, Any]) -> dict[str, Any]:
    """What is shown of the claims: texts with units, `sign` for the verdict's colour, `search` for the filter."""
    seconds, paper = content.get("cpu_seconds"), content.get("paper")
    own = reported.load(paper).own_method if paper in reported.papers() else "ours"
    title = content.get("title", "Claims")
    return {
        "title": f"{title} (quick: a trial of the machinery, no evidence)" if content.get("quick") else title,
        "command": content.get("command"),
        "cpu": f"{seconds / 3600:.1f} hours of CPU time" if seconds else None,
        "own": own,
        "claims": [_claim_values(claim, own) for claim in content["claims"]],
    }


def _claim_values(claim: dict[str, Any], own: str) -> dict[str, Any]:
    is_fraction = FRACTIONS.fullmatch(claim["metric"].rpartition("/")[2])
    unit, digits, sign = ("percent", 2, " %") if is_fraction else ("none", 3, "")
    shown = {name: f"{as_reported(claim[name], unit):.{digits}f}{sign}" for name in ("ours", "theirs")}
    own = claim.get("own", own)
    mean, low, high = (claim["difference"].get(key) for key in ("mean", "low", "high"))
    interval = ""
    if low is not None and high is not None:
        low, high = (f"{as_reported(bound, unit):+.{digits}f}" for bound in (low, high))
        interval = f"{low} to {high}, {claim['difference'].get('n', '?')} seeds"
    if episodes := claim.get("episodes"):
        interval += f"{'; ' * bool(interval)}by all episodes: {episodes['pooled']['verdict']}"
    return shown | {
        "claim": claim["claim"],
        "source": claim.get("source", ""),
        "metric": claim["metric"],
        "rival": claim["rival"],
        "methods": [own, claim["rival"]],
        "difference": f"{as_reported(mean, unit):+.{digits}f}",
        "interval": interval,
        "verdict": claim["verdict"],
        "sign": COLOURS.get(claim["verdict"], "muted"),
        "search": f"{claim['claim']} {claim['metric']} {claim['metric'].replace('_', ' ')}".lower(),
    }
