"""The first page: a card per pair with its headline, whether to believe it, what is missing, where it came from."""

from typing import Any

import pandas as pd

from scspec.charts import ARM_LABELS, decoding, number
from scspec.jobs import GRID_ARM
from scspec.report.headline import ShortestTexts, at_loss, best_speedups, speedup_text
from scspec.report.provenance import provenance
from scspec.report.run import Run, comparable, platforms
from scspec.report.state import absent_cells
from scspec.report.tables import controls_of, whole
from scspec.report.verdicts import BROKEN, HOLDS, audit_verdicts, identity_verdicts
from scspec.stats import KEPT_SHARE

ACCEPTED_LOSS = 0.05  # rise of perplexity that the headline accepts until the reader moves the slider


def index_page(run: Run, stem: str, shortest: ShortestTexts) -> dict[str, Any]:
    """What the template of the index shows; `stem`: the name of the tables beside it."""
    plan = run.plan
    failed, missing = absent_cells(plan)
    verdicts = identity_verdicts(run.summary, [cell["pair"] for cell in plan["cells"]])
    audits = audit_verdicts(run.blocks, run.summary, plan)
    return {
        "root": "",
        "heading": "Acceptance under stochastic computing",
        "lead": "How far may the bit streams of draft and target shrink before the target stops accepting the draft's "
        "proposals?",
        "charts": [],
        "demonstration": plan["demonstration"],
        "alarms": _alarms(verdicts, audits, run),
        "platforms": platforms(run.summary),
        "facts": _facts(run, failed, missing, verdicts),
        "cards": _cards(run, shortest),
        "kept_share": f"{KEPT_SHARE:.0%}",
        "verdicts": verdicts,
        "controls": _control_rows(run.summary),
        "audits": audits,
        "stem": stem,
        "failed": failed,
        "missing": missing,
        "arm_labels": ARM_LABELS,
        "invalid": plan["invalid"],
        "invalid_columns": _columns(plan["invalid"]),
        "provenance": provenance(run),
    }


def _cards(run: Run, shortest: ShortestTexts) -> list[dict[str, Any]]:
    """A card per pair, way of decoding and platform, in the order of the plan."""
    cards: list[dict[str, Any]] = []
    for (pair, do_sample), platform, cells in comparable(run.summary, "pair", "do_sample"):
        grid = cells[cells["arm"] == GRID_ARM]
        steps = best_speedups(grid) if len(grid) else []
        at = at_loss(steps, ACCEPTED_LOSS)
        cards.append(
            {
                "id": f"card-{len(cards)}",
                "pair": pair,
                "decoding": decoding(do_sample),
                "platform": platform,
                "cells": f"{len(cells)} cells, {len(grid)} of them of the grid",
                "steps": [speedup_text(step) for step in steps],
                "at": max(at, 0),
                "accepted": f"{ACCEPTED_LOSS:+.0%}",
                "reached": at >= 0,
                "nothing": _nothing(steps),
                "alphas": _alpha_range(grid),
                "shortest": shortest[pair, do_sample, platform],
            }
        )
    planned = list(dict.fromkeys(cell["pair"] for cell in run.plan["cells"]))
    return sorted(cards, key=lambda card: planned.index(card["pair"]))


def _nothing(steps: list[dict[str, Any]]) -> str:
    """What a card says where no target is good enough."""
    if not steps:
        return "Unknown: no target of the grid has both a cost in SC and a measured perplexity."
    return f"No target of the grid is that good: perplexity rises by {steps[0]['loss']:.1%} or more."


def _alpha_range(grid: pd.DataFrame) -> str:
    if grid.empty:
        return "no cell of the grid yet"
    return f"{number(grid['alpha'].min())} to {number(grid['alpha'].max())}"


def _control_rows(summary: pd.DataFrame) -> list[dict[str, str]]:
    """alpha of each control, a row per arm and setting."""
    return [
        {
            "pair": cell.pair,
            "control": ARM_LABELS[cell.arm],
            "streams, target / draft": " / ".join(
                whole(length, "float") for length in (cell.target_stoc_len, cell.draft_stoc_len)
            ),
            "gamma": str(cell.gamma),
            "alpha": number(cell.alpha),
        }
        for cell in controls_of(summary).itertuples()
    ]


def _columns(entries: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    return [*(name for name in names if name != "reason"), "reason"]


def _alarms(verdicts: list[dict[str, str]], audits: list[dict[str, str]], run: Run) -> list[str]:
    alarms = [f"Audit of the replay: {its['verdict']}. {its['detail']}." for its in audits if its["verdict"] == BROKEN]
    alarms += [
        f"{its['pair']} ({its['platform']}): {its['verdict']}. {its['detail']}."
        for its in verdicts
        if its["verdict"] == BROKEN
    ]
    used = [its["prompts"] for its in run.metadata.values()]
    prompts = sorted({f"{its['file']}, sha256 {its['sha256']}" for its in used})
    if len(prompts) > 1:
        listed = "; ".join(prompts)
        alarms.append(f"The cells come from {len(prompts)} different prompt files, do not compare across: {listed}.")
    return alarms


def _facts(
    run: Run, failed: list[dict[str, Any]], missing: list[dict[str, Any]], verdicts: list[dict[str, str]]
) -> list[tuple[str, str]]:
    """Label and value of what a reader wants to know first."""
    holding = sum(its["verdict"] == HOLDS for its in verdicts)
    each = "pairs" if len({its["pair"] for its in verdicts}) == len(verdicts) else "pairs and platforms"
    names = list(platforms(run.summary))
    return [
        ("cells", f"{len(run.summary)} of {len(run.plan['cells'])}"),
        ("failed", str(len(failed))),
        ("missing", str(len(missing))),
        ("impossible", str(len(run.plan["invalid"]))),
        ("prompts", str(run.blocks["prompt_id"].nunique())),
        ("tokens", f"{run.blocks['kept'].sum():,}"),
        ("decoding", ", ".join(sorted({decoding(value) for value in run.summary["do_sample"]})) or "none"),
        ("identity holds", f"{holding} of {len(verdicts)} {each}"),
        ("computed on", "; ".join(names) if len(names) == 1 else f"{len(names)} platforms"),
    ]
