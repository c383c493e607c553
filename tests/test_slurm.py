"""The Slurm that tests run on does what tests of faults rely on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_box import SlurmBox, wait, what_is_missing

pytestmark = pytest.mark.slurm
FINAL_STATES = {"CANCELLED", "FAILED", "NODE_FAIL", "COMPLETED"}


def ended(slurm: SlurmBox, job: str) -> str:
    """Return how a job ends; waits for it."""
    return wait(lambda: (state := slurm.state(job)) in FINAL_STATES and state)


def running(slurm: SlurmBox, job: str) -> None:
    wait(lambda: slurm.jobs().get(job) == "RUNNING")


def test_a_job_runs_with_the_gpus_it_asked_for_and_is_accounted(slurm: SlurmBox, tmp_path: Path) -> None:
    job = slurm.submit(f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/seen; sleep 2", "--gpus-per-node=2")
    running(slurm, job)
    assert slurm.run("squeue", "--noheader", "--Format=tres-per-node:30").strip().endswith("gpu:2")
    assert ended(slurm, job) == "COMPLETED"
    assert len((tmp_path / "seen").read_text().split(",")) == 2
    wait(lambda: slurm.accounted(job) == "COMPLETED")


def test_more_jobs_run_at_once_than_the_machine_has_cores(slurm: SlurmBox) -> None:
    jobs = [slurm.submit("sleep 30") for _ in range(6)]
    wait(lambda: slurm.jobs() == dict.fromkeys(jobs, "RUNNING"))


def test_a_drained_node_keeps_jobs_pending_and_one_that_is_down_fails_them(slurm: SlurmBox) -> None:
    slurm.node("drain")
    job = slurm.submit("sleep 30", "--no-requeue")
    wait(lambda: "drain" in slurm.run("squeue", "--noheader", "-o", "%R").lower())
    assert slurm.jobs() == {job: "PENDING"}
    slurm.node("resume")
    running(slurm, job)
    slurm.node("down")
    assert ended(slurm, job) == "NODE_FAIL"


def test_jobs_are_suspended_requeued_and_cancelled(slurm: SlurmBox, tmp_path: Path) -> None:
    job = slurm.submit(f"echo began >> {tmp_path}/starts; sleep 30", "--requeue")
    running(slurm, job)
    slurm.suspend(job)
    assert slurm.state(job) == "SUSPENDED"
    slurm.resume(job)
    assert slurm.state(job) == "RUNNING"
    wait(lambda: (tmp_path / "starts").exists())
    slurm.requeue(job)
    wait(lambda: (tmp_path / "starts").read_text().split() == ["began", "began"])
    slurm.cancel(job)
    assert ended(slurm, job) == "CANCELLED"


def test_a_job_of_partition_low_is_requeued_for_one_of_high(slurm: SlurmBox) -> None:
    low = slurm.submit("sleep 60", "--partition=low", "--requeue", "--cpus-per-task=8")
    running(slurm, low)
    high = slurm.preempt()
    assert ended(slurm, high) == "COMPLETED"
    assert slurm.state(low) == "PENDING"


def test_a_job_that_takes_more_memory_than_it_asked_for_is_killed(slurm: SlurmBox) -> None:
    job = slurm.submit(f"{sys.executable} -c 'import time; x = b\"1\" * 400_000_000; time.sleep(30)'")
    assert ended(slurm, job) == "FAILED"
    assert "Exceeded job memory limit" in (slurm.folder / f"job-{job}.out").read_text()


def test_jobs_run_on_while_the_controller_is_away(slurm: SlurmBox) -> None:
    job = slurm.submit("sleep 3")
    running(slurm, job)
    with slurm.without_controller(), pytest.raises(RuntimeError, match="Unable to contact slurm controller"):
        slurm.jobs()
    assert ended(slurm, job) == "COMPLETED"


def test_without_accounting_the_queue_is_still_told(slurm: SlurmBox) -> None:
    with slurm.without_accounting():
        job = slurm.submit("sleep 1")
        assert job in slurm.jobs()
        assert ended(slurm, job) == "COMPLETED"
        with pytest.raises(RuntimeError, match="accounting storage is disabled"):
            slurm.accounted(job)


def test_a_box_that_is_stopped_leaves_no_process(slurm: SlurmBox) -> None:
    code = (
        "import os, sys, tempfile; from pathlib import Path; from slurm_box import SlurmBox\n"
        "box = SlurmBox(Path(tempfile.mkdtemp(dir=sys.argv[1]))); box.start(); box.submit('sleep 1000')\n"
        "print(len(box.processes())); box.stop(); print(len(box.processes()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, "/tmp"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before >= 5
    assert after == 0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm_box.shutil.which", lambda name, path: None if name == "slurmdbd" else name)
    assert what_is_missing().startswith("Slurm's programs slurmdbd are not installed: apt-get install ")
    monkeypatch.setattr("slurm_box.shutil.which", lambda name, path: name)
    monkeypatch.setattr("slurm_box.os.geteuid", lambda: 1000)
    assert what_is_missing() == "a Slurm of one's own needs root"
