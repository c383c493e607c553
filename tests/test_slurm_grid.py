"""A whole grid on a real Slurm, as users type it: from the models to the report, loops and replays."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from slurm_box import SlurmBox
from slurm_project import Project, make_project

from scspec.results import check_identities, read_cell, read_cells

pytestmark = pytest.mark.slurm
ON_THE_CLUSTER = ("cell", "trajectory", "predictions", "quality")
RESOURCES = tuple(f"{rule}:{ask}" for rule in ON_THE_CLUSTER for ask in ("mem_mb=2000", "runtime=5"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tests here build on one another: the second finds what the first has left."""
    return make_project(tmp_path_factory.mktemp("grid"))


def run(project: Project, *arguments: str) -> str:
    """Return the messages of a whole run, whose first jobs may all have to compile what is compiled."""
    with project.running(*arguments, targets=(), resources=RESOURCES) as running:
        return running.messages(timeout=500)


def grid(project: Project) -> list[Path]:
    return sorted((project.folder / "results/cells").rglob("*.parquet"))


def job_of(path: Path) -> str:
    """Return the Slurm job that made a file."""
    return read_cell(path)[1]["attempts"][-1]["job"]


def test_a_replayed_grid_with_quality_ends_in_a_report(slurm: SlurmBox, project: Project) -> None:
    changed = ("--config", "method=replay", "quality={enabled: true}")
    run(project, *changed)
    (audit,) = [path for path in grid(project) if "/audit/" in str(path)]
    replays = [path for path in grid(project) if path != audit]
    assert len(replays) == 2
    assert job_of(audit)
    blocks, metadata = read_cells(grid(project))
    check_identities(blocks)
    assert {its["cell"]["method"] for its in metadata.values()} == {"loop", "replay"}
    for folder, files in (("trajectories", 2), ("predictions", 1), ("quality", 1)):
        found = list((project.folder / "results" / folder).rglob("*.parquet"))
        assert len(found) == files, folder
        assert all(b'"job": null' not in pq.read_schema(path).metadata[b"scspec"] for path in found)
    assert "Audit of the replay" in (project.folder / "reports/index.html").read_text()
    (page,) = (project.folder / "reports/pairs").iterdir()
    assert "continuations" in page.read_text()
    assert "Nothing to be done" in run(project, *changed)


def test_loops_beside_replays_run_what_is_missing(slurm: SlurmBox, project: Project) -> None:
    """The audit is not a cell of a grid of loops; the replays stay, and count for nothing."""
    before = {path: path.stat().st_mtime_ns for path in grid(project)}
    run(project)
    added = [path for path in grid(project) if path not in before]
    assert len(added) == 2
    assert all(job_of(path) for path in added)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "Audit of the replay" not in (project.folder / "reports/index.html").read_text()
