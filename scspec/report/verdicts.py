"""Whether a run can be believed: identity cells at exactly 1, and a replay's audit against its loop.

A verdict is of cells that may be compared (`run.comparable`).
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pandas as pd

from scspec.charts import number
from scspec.config import REPLAY
from scspec.jobs import AUDIT_ARM, Cell
from scspec.report.run import comparable

IDENTITY = "identity"
HOLDS, BROKEN, NOT_RUN, SAMPLED = "holds", "BROKEN: the run is broken", "not run", "sampled: other texts"
_SETTINGS = {item.name for item in fields(Cell)} - {"id", "arm", "method"}  # what an audit shares with its replay
_AUDITED = ["prompt_id", "turn", "block", "start", "emitted_ids", "accepted", "kept", "beta", "margin", "stop"]


def identity_verdicts(summary: pd.DataFrame, pairs: Iterable[str] = ()) -> list[dict[str, str]]:
    """Per pair and platform, whether its `identity` cells hold: beta exactly 1 everywhere, every proposal accepted.

    A pair that is in `pairs` only has a verdict too, with no platform.
    """
    verdicts = [
        {"pair": pair, "platform": platform, **_identity_verdict(cells[cells["arm"] == IDENTITY])}
        for (pair,), platform, cells in comparable(summary, "pair")
    ]
    without_cells = [pair for pair in dict.fromkeys(pairs) if pair not in set(summary["pair"])]
    nothing = _identity_verdict(summary.iloc[:0])
    return verdicts + [{"pair": pair, "platform": "", **nothing} for pair in without_cells]


def _identity_verdict(cells: pd.DataFrame) -> dict[str, str]:
    broken = cells[(cells["beta_min"] != 1) | (cells["acceptance_rate"] != 1)]
    if cells.empty:
        return {"verdict": NOT_RUN, "detail": "no identity cell: nothing shows that the run is exact"}
    if broken.empty:
        return {"verdict": HOLDS, "detail": f"alpha is exactly 1 over {cells['tokens'].sum():,} tokens"}
    worst = broken.loc[broken["alpha"].idxmin()]
    return {"verdict": BROKEN, "detail": f"alpha is {number(worst['alpha'])} in {worst['cell_id']}, and must be 1"}


def audit_verdicts(blocks: pd.DataFrame, summary: pd.DataFrame, plan: dict[str, Any]) -> list[dict[str, str]]:
    """Of a replayed plan, whether the cell that was run as a loop too has the blocks that its replay derived.

    Greedy blocks must be equal, one by one. Sampled ones are of another text: their tau is shown beside the expected.
    """
    return [
        {"cell": audit["id"], **_audit_verdict(blocks, summary, audit["id"], _replay_of(audit, plan["cells"])["id"])}
        for audit in plan["cells"]
        if audit["arm"] == AUDIT_ARM
    ]


def _replay_of(audit: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    settings = _SETTINGS & audit.keys()
    same = [cell for cell in cells if all(cell[name] == audit[name] for name in settings)]
    return next(cell for cell in same if cell["method"] == REPLAY)


def _audit_verdict(blocks: pd.DataFrame, summary: pd.DataFrame, loop_id: str, replay_id: str) -> dict[str, str]:
    loop, replay = (blocks[blocks["cell_id"] == cell_id] for cell_id in (loop_id, replay_id))
    if loop.empty or replay.empty:
        return {"verdict": NOT_RUN, "detail": f"needs {loop_id} and {replay_id}"}
    if loop["do_sample"].iloc[0]:
        taus = summary.set_index("cell_id")["tau"]
        return {"verdict": SAMPLED, "detail": f"tau {number(taus[loop_id])}, expected {number(taus[replay_id])}"}
    texts = [its[_AUDITED].map(str).reset_index(drop=True) for its in (loop, replay)]
    if texts[0].equals(texts[1]):
        return {"verdict": HOLDS, "detail": f"{len(loop):,} blocks are equal to the loop's"}
    return {"verdict": BROKEN, "detail": f"{replay_id} has other blocks than the loop {loop_id}"}
