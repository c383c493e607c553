"""What a cluster does to jobs, each on a real Slurm: the cell's rows are those of an undisturbed run, the user is told.

Not here: a Snakemake that is killed or interrupted while its jobs live on (test_executor.py).
"""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
from slurm_box import SlurmBox, skip, wait
from slurm_project import CELL, OTHER, RESOURCES, Project, Running, built_project, rows_of

from scspec.results import read_cell

pytestmark = pytest.mark.slurm
TWO_MINUTES = ("cell:mem_mb=2000", "cell:runtime=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose cells were built without Slurm; not to be changed."""
    return built_project(tmp_path_factory.mktemp("undisturbed"), CELL, OTHER)


@pytest.fixture
def project(undisturbed: Project, tmp_path: Path) -> Project:
    """A copy of it without the cells."""
    return undisturbed.copy(tmp_path / "project")


@pytest.fixture
def check(project: Project, undisturbed: Project):
    """A function: `CELL` has the undisturbed rows; each of its attempts brought so many of its prompts."""

    def check(*prompts: int) -> None:
        pd.testing.assert_frame_equal(rows_of(project.cell), rows_of(undisturbed.cell))
        _, metadata = read_cell(project.cell)
        assert tuple(attempt["prompts"] for attempt in metadata["attempts"]) == prompts
        assert not list(project.cell.parent.glob(".*.partial"))

    return check


def the_job(slurm: SlurmBox, state: str) -> str:
    """Return the id of the only job in the queue, once it is in this state."""

    def found() -> str | None:
        jobs = slurm.jobs()
        return next(iter(jobs)) if list(jobs.values()) == [state] else None

    return wait(found, 180)


def held_job(slurm: SlurmBox, project: Project, prompts: int = 2) -> str:
    """Return the id of the job whose cell waits after so many prompts."""
    wait(lambda: project.kept() == prompts, 60)
    return the_job(slurm, "RUNNING")


def leaves(slurm: SlurmBox, job: str) -> None:
    wait(lambda: job not in slurm.jobs(), 180)


def processes_of(job: str) -> list[psutil.Process]:
    """Return submitit's worker of a job and all its children."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, environment = process.info["cmdline"] or [""], process.info["environ"] or {}
        is_worker = command[0] == sys.executable and "submitit.core._submit" in command
        if is_worker and environment.get("SLURM_JOB_ID") == job:
            return [process, *process.children(recursive=True)]
    raise AssertionError(f"job {job} has no worker")


def kill(job: str) -> None:
    """Kill what a job runs, submitit's worker first; Slurm without cgroups might leave its children."""
    for process in processes_of(job):
        process.kill()


def said_of(job: str, messages: str) -> str:
    """Return what Snakemake said of a job's failure, in a line; before and after it has named the job's log."""
    assert re.search(
        rf"(Last lines of|Nothing was written to) /\S+/\.snakemake/submitit/\S+/{job}_0_log\.err", messages
    )
    found = re.search(rf"message: {job} (.+)", messages)
    assert found, messages
    return found[1]


@pytest.mark.parametrize("accounting", [True, False])
def test_a_running_job_is_cancelled(slurm: SlurmBox, project: Project, check, accounting: bool) -> None:
    project.hold(prompts=2)
    accounts = contextlib.nullcontext() if accounting else slurm.without_accounting()
    with accounts, project.running("--retries=1") as snakemake:
        job = held_job(slurm, project)
        slurm.cancel(job)
        leaves(slurm, job)  # Slurm signals it later: released before, it may finish its last prompt
        project.release()
        messages = snakemake.messages()
    assert said_of(job, messages).startswith("left no result; Slurm says CANCELLED")
    check(2, 1)


def test_a_pending_job_is_cancelled_and_one_waits_for_a_drained_node(slurm: SlurmBox, project: Project, check) -> None:
    slurm.node("drain")
    with project.running("--retries=1") as snakemake:
        job = the_job(slurm, "PENDING")
        slurm.cancel(job)
        wait(lambda: "Trying to restart" in snakemake.said())
        assert the_job(slurm, "PENDING") != job
        waits_on(snakemake)
        slurm.node("resume")
        messages = snakemake.messages()
    assert said_of(job, messages).startswith("left no result; Slurm says CANCELLED")
    assert "Nothing was written" in messages
    check(3)


def waits_on(snakemake: Running) -> None:
    """Snakemake takes no job for dead, also when it has looked for longer than --latency-wait."""
    time.sleep(6)
    assert snakemake.process.poll() is None, snakemake.said()


def test_a_worker_is_killed(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    with project.running("--retries=1") as snakemake:
        job = held_job(slurm, project)
        kill(job)
        project.release()
        messages = snakemake.messages()
    assert said_of(job, messages).startswith("left no result; Slurm says FAILED, exit code 137")
    check(2, 1)


def test_a_job_out_of_memory_gets_more_the_next_time(slurm: SlurmBox, project: Project, check) -> None:
    resources = ("cell:mem_mb=200 * attempt ** 4", "cell:runtime=5")
    with project.running("--retries=1", resources=resources) as snakemake:
        job = the_job(slurm, "RUNNING")
        messages = snakemake.messages()
    assert said_of(job, messages).startswith("left no result; Slurm says")
    assert "Exceeded job memory limit" in messages
    assert "mem_mb=3200" in messages
    check(3)


def test_a_job_at_its_time_limit_goes_on_where_it_was(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    with project.running("--submitit-warning=75", resources=TWO_MINUTES) as snakemake:
        job = held_job(slurm, project)
        assert the_job(slurm, "PENDING") == job
        project.release()
        messages = snakemake.messages()
    assert "Error" not in messages
    check(2, 1)


def test_a_job_at_its_time_limit_that_may_not_go_on_fails(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    limit = ("--submitit-warning=75", "--submitit-requeues=0")
    with project.running(*limit, "--retries=1", resources=TWO_MINUTES) as snakemake:
        job = held_job(slurm, project)
        leaves(slurm, job)
        project.release()
        messages = snakemake.messages()
    assert said_of(job, messages).endswith("Job not requeued because: timed-out too many times.")
    check(2, 1)


def test_a_preempted_job_goes_on_where_it_was(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    with project.running("--submitit-partition=low") as snakemake:
        job = held_job(slurm, project)
        slurm.preempt()
        wait(lambda: slurm.jobs()[job] == "PENDING")
        project.release()
        messages = snakemake.messages()
    assert "Error" not in messages
    check(2, 1)


def test_a_node_goes_down_and_its_job_is_requeued(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    with project.running() as snakemake:
        job = held_job(slurm, project)
        slurm.node("down")
        assert the_job(slurm, "PENDING") == job
        project.release()
        slurm.node("resume")
        messages = snakemake.messages()
    assert "Error" not in messages
    check(2, 1)


def test_a_node_goes_down_and_its_job_is_lost(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    with project.running("--retries=1", SBATCH_NO_REQUEUE="1") as snakemake:
        job = held_job(slurm, project)
        slurm.node("down")
        leaves(slurm, job)
        project.release()
        slurm.node("resume")
        messages = snakemake.messages()
    assert said_of(job, messages).startswith("left no result; Slurm says NODE_FAIL")
    check(2, 1)


def test_jobs_end_and_are_submitted_while_the_controller_is_away(
    slurm: SlurmBox, project: Project, undisturbed: Project, check
) -> None:
    project.hold(prompts=2)
    with project.running("--jobs=1", targets=(CELL, OTHER)) as snakemake:
        held_job(slurm, project)
        with slurm.without_controller():
            project.release()
            wait(lambda: "1 of 2 steps" in snakemake.said(), 60)
            wait(lambda: "the cluster does not answer, submitting again" in snakemake.said(), 60)
        messages = snakemake.messages()
    assert "the cluster answers again" in messages
    assert "Error" not in messages
    check(3)
    pd.testing.assert_frame_equal(rows_of(project.folder / OTHER), rows_of(undisturbed.folder / OTHER))


def test_a_suspended_job_is_waited_for(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    with project.running() as snakemake:
        job = held_job(slurm, project)
        slurm.suspend(job)
        project.release()
        waits_on(snakemake)
        slurm.resume(job)
        messages = snakemake.messages()
    assert "Error" not in messages
    check(3)


def test_what_slurm_refuses_is_quoted(slurm: SlurmBox, project: Project, check) -> None:
    messages = project.run("--submitit-partition=nosuch", status=1)
    assert "message: Not submitted: sbatch: error: invalid partition specified: nosuch" in messages
    messages = project.run(resources=(*RESOURCES, "cell:gpus=9"), status=1)
    assert "Requested node configuration is not available" in messages
    project.run(resources=(*RESOURCES, "cell:gpus=2"))
    check(3)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 64 KB at `folder`; mounting one needs more than root in some containers."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        skip(f"no small disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Return a new file that takes all that a disk has left."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return ballast


def test_a_disk_is_full_when_the_cell_is_written(slurm: SlurmBox, project: Project, check) -> None:
    with small_disk(project.cell.parent):
        project.hold(prompts=3)
        with project.running() as snakemake:
            job = held_job(slurm, project, prompts=3)
            ballast = fill(project.cell.parent)
            project.release()
            messages = snakemake.messages(status=1)
        assert said_of(job, messages) == "failed with exit status 1"
        assert f"No space left on device: '{CELL}'" in messages
        assert not project.cell.exists()
        ballast.unlink()
        project.run()
        check(3, 0)


def test_a_torn_file_that_a_crash_left_is_not_a_result(
    slurm: SlurmBox, project: Project, undisturbed: Project, check
) -> None:
    project.hold(prompts=4)
    with project.running() as snakemake:
        job = held_job(slurm, project, prompts=3)
        wait(lambda: list(project.cell.parent.glob(".*.tmp")))
        snakemake.kill()
        kill(job)
    project.release()
    leaves(slurm, job)
    project.cell.write_bytes(undisturbed.cell.read_bytes()[:5000])
    project.run("--unlock")
    assert "reason: Forced execution" in project.run()
    check(3, 0)


def test_a_submission_folder_is_deleted_while_a_job_runs(slurm: SlurmBox, project: Project, check) -> None:
    project.hold(prompts=2)
    with project.running() as snakemake:
        held_job(slurm, project)
        shutil.rmtree(project.folder / ".snakemake" / "submitit")
        project.release()
        messages = snakemake.messages()
    assert "Error" not in messages
    check(3)


def test_a_submission_folder_is_deleted_before_a_job_runs(slurm: SlurmBox, project: Project, check) -> None:
    slurm.node("drain")
    with project.running("--retries=1") as snakemake:
        job = the_job(slurm, "PENDING")
        shutil.rmtree(project.folder / ".snakemake" / "submitit")
        slurm.node("resume")
        messages = snakemake.messages()
    assert said_of(job, messages).startswith("left no result; Slurm says FAILED")
    check(3)
