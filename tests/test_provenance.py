"""Provenance: what is not installed is said, not fatal; any edit of the sources is seen; which job it was."""

import re
import tomllib
from pathlib import Path

import pytest

from scspec import provenance


def test_a_package_that_is_not_here_has_no_version(monkeypatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    found = provenance.versions()
    assert list(found) == ["python", "numpy", "no-such-package"]
    assert found["numpy"]
    assert found["no-such-package"] is None


def test_what_compiles_kernels_is_recorded() -> None:
    """The requirements of Linux alone are those of a GPU."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    of_linux = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"] if "platform_system" in line}
    assert of_linux
    assert of_linux <= set(provenance.PACKAGES)


def test_any_edit_of_the_sources_is_another_state_of_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    python, cuda = tmp_path / "a.py", tmp_path / "sc" / "a.cu"
    cuda.parent.mkdir()
    found = []
    for change in (
        lambda: python.write_text("1"),
        lambda: cuda.write_text("1"),
        lambda: cuda.write_text("2"),
        lambda: python.rename(tmp_path / "b.py"),
    ):
        change()
        found.append(provenance.sources_sha256())
    assert len(set(found)) == 4
    (tmp_path / "notes.txt").touch()
    assert provenance.sources_sha256() == found[-1]


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "26"}, "26"),
        ({"SLURM_JOB_ID": "30", "SLURM_ARRAY_JOB_ID": "26", "SLURM_ARRAY_TASK_ID": "4"}, "26_4"),
    ],
)
def test_the_job_is_named_as_slurm_names_it(monkeypatch, variables, job) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert provenance.slurm_job() == job
