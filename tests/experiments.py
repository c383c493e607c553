"""Small experiments, and the jobs that they have, for the tests of cells."""

from pathlib import Path
from typing import Any

from scspec.cells import expand, qualities
from scspec.config import load_experiment
from scspec.jobs import Cell, Quality

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPTS = str(REPOSITORY / "prompts" / "smoke.jsonl")


def experiment_of(**changes: Any) -> dict[str, Any]:
    """Return a small configuration: one pair, one grid point, no controls."""
    return {
        "pairs": {"tiny": {"target": {"model": "big"}, "draft": {"model": "small", "skip_layers": [1]}}},
        "stoc_len": [128],
        "sc_prec": [8],
        "gamma": [4],
        "prompt_file": PROMPTS,
        "controls": {"enabled": False},
        **changes,
    }


def pair_of(**draft: Any) -> dict[str, Any]:
    """Return `pairs` with one pair whose draft has these settings."""
    return {"tiny": {"target": {"model": "big"}, "draft": {"model": "small", **draft}}}


def cells_of(**changes: Any) -> dict[str, Cell]:
    """Return the cells of a configuration by id."""
    cells, _ = expand(load_experiment(experiment_of(**changes)))
    by_id = {cell.id: cell for cell in cells}
    assert len(by_id) == len(cells)
    return by_id


def quality_of(**changes: Any) -> tuple[dict[str, Quality], Any]:
    """Return what is measured of each cell's target, by cell id, and the experiment; controls are on."""
    experiment = load_experiment(experiment_of(**{"controls": {}, **changes}))
    return qualities(experiment, expand(experiment)[0]), experiment


def control(arm: str, **changes: Any) -> list[Cell]:
    """Return the cells of one control arm."""
    changes.setdefault("controls", {"arms": [arm]})
    return [cell for cell in cells_of(**changes).values() if cell.arm == arm]
