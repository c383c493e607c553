"""How far a grid has come: which of its cells are done, failed, or were not run yet."""

from pathlib import Path
from typing import Any

_LAST_BYTES = 4096


def absent_cells(plan: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (failed, missing) cells of a plan that have no file.

    failed: those whose log (`log` of the plan's cell) has a line, the last of which is in "said"; a job that still
    runs, or was killed, is among them. missing: all others.
    """
    failed: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for cell in plan["cells"]:
        if Path(cell["path"]).exists():
            continue
        said = _last_line(Path(cell["log"])) if cell.get("log") else None
        (missing if said is None else failed).append({**cell, "said": said})
    return failed, missing


def _last_line(path: Path) -> str | None:
    """Return the last line of a file that is not blank; None if there is none, or no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None
