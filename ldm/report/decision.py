"""The page that explains a decision of the gate: what was decided and why, then the numbers."""

import math
from os import PathLike
from typing import Any

from pandas import DataFrame

from ldm.report.page import write_page
from ldm.report.plots import differences

SHOWN = 3  # images that gain most, and as many that lose most


def decision_page(
    path: str | PathLike[str], decision: Any, frame: DataFrame | None, *, challenger: str, champion: str | None
) -> None:
    """Write a decision, an `ldm.evaluation.gate.Decision`, as one self-contained HTML page.

    `frame` has one row per image key and the columns `challenger` and `champion` (nats), or is None where nothing
    was compared. `challenger` and `champion` are the models' names, e.g. "ldm version 7".
    """
    values: dict[str, Any] = {"decision": decision, "challenger": challenger, "champion": champion, "compared": False}
    if frame is not None and champion is not None and math.isfinite(decision.mean):
        gains = (frame["challenger"] - frame["champion"]).sort_values(kind="stable", ascending=False)
        keys = list(dict.fromkeys([*gains.index[:SHOWN], *gains.index[-SHOWN:]]))
        values |= {
            "compared": True,
            "bits": abs(decision.mean) / math.log(2),
            "share": abs(decision.mean / float(frame["champion"].mean())),
            "better": float((gains > 0).mean()),
            "changes": [(key, gains[key], frame["challenger"][key], frame["champion"][key]) for key in keys],
            "chart": differences(gains.to_numpy(), x_label="improvement, nats"),
        }
    write_page(path, "decision.html", **values)
