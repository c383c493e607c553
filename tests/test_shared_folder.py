"""Several runs on one results folder at a time: none damages what another does, and the rows are the undisturbed ones.

Not here: cells that share a GPU (test_gpus.py); runs that read each other's partial files (test_checkpoint.py).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from slurm_box import wait
from slurm_project import CELL, HERE, Project, built_project, rows_of

from scspec.cells import expand
from scspec.config import load_experiment, read_config

LOCKED = "Error: Directory cannot be locked. Please make sure that no other Snakemake process is trying to create"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose cell was built by one run alone; not to be changed."""
    return built_project(tmp_path_factory.mktemp("undisturbed"), CELL)


def hidden(project: Project, ending: str = "") -> list[Path]:
    """Return the temporary files beside a project's cell."""
    return sorted(project.cell.parent.glob(f".*{ending}"))


def assert_whole(project: Project, undisturbed: Project) -> None:
    """The cell alone is there, with the undisturbed rows, and nothing temporary."""
    assert list(project.cell.parent.iterdir()) == [project.cell]
    pd.testing.assert_frame_equal(rows_of(project.cell), rows_of(undisturbed.cell))


def test_a_second_snakemake_in_one_folder_is_refused_and_damages_nothing(undisturbed: Project, tmp_path: Path) -> None:
    project = undisturbed.copy(tmp_path / "project")
    project.hold(prompts=1)
    with project.running(profile=HERE) as first:
        wait(lambda: project.kept() == 1, 120)
        (kept,) = hidden(project)
        before = kept.read_bytes()
        refused = project.run(profile=HERE, status=1)
        assert any(line.startswith(LOCKED) for line in refused.splitlines()), refused
        assert "Traceback" not in refused
        assert hidden(project) == [kept]
        assert kept.read_bytes() == before
        project.release()
        first.messages()
    assert_whole(project, undisturbed)


def test_two_processes_that_write_one_cell_at_a_time_both_succeed(
    undisturbed: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither knows of the other's prompts, and both have written the file before either gives it its name."""
    project = undisturbed.copy(tmp_path / "project")
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("PYTHONPATH", "site")
    found, _ = expand(load_experiment(read_config(Path("config.yaml"))))
    (cell,) = (cell for cell in found if str(cell.path()) == CELL)
    command = [sys.executable, "-m", "scspec", "run-cell", cell.to_json(), "--output", CELL]
    project.hold(prompts=0)
    with subprocess.Popen(command) as one, subprocess.Popen(command) as other:
        try:
            wait(lambda: len(hidden(project, ".partial")) == 2, 120)
            project.hold(prompts=4)
            wait(lambda: len(hidden(project, ".tmp")) == 2, 120)
            assert not project.cell.exists()
            project.release()
            assert (one.wait(120), other.wait(120)) == (0, 0)
        finally:
            one.kill()
            other.kill()
    assert_whole(project, undisturbed)


def test_a_second_clone_on_one_results_folder_is_refused_and_runs_when_the_first_has_ended(
    undisturbed: Project, tmp_path: Path
) -> None:
    """Snakemake alone would delete what the other has just finished. A file that a crash left hidden is no cell."""
    clones = one, other = [undisturbed.copy(tmp_path / name) for name in ("one", "other")]
    shutil.move(one.folder / "results", tmp_path / "shared")
    shutil.rmtree(other.folder / "results")
    for clone in clones:
        (clone.folder / "results").symlink_to(tmp_path / "shared")
    left = one.cell.parent / f".{one.cell.name}.1.a.tmp"
    left.parent.mkdir(parents=True)
    shutil.copy(undisturbed.cell, left)
    one.hold(prompts=1)
    with one.running(profile=HERE) as first:
        wait(lambda: one.kept() == 1, 120)
        refused = other.run(profile=HERE, status=1)
        said = rf"^results: in use by .+, process {first.process.pid} in {one.folder}; allowed: one Snakemake at a time"
        assert re.search(said, refused, re.MULTILINE), refused
        assert one.kept() == 1
        one.release()
        first.messages()
    left.unlink()
    assert_whole(one, undisturbed)
    before = one.cell.stat().st_mtime_ns
    assert "Nothing to be done" in other.run(profile=HERE)
    assert one.cell.stat().st_mtime_ns == before
