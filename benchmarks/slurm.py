"""How long jobs wait for the executor, on a Slurm of one node that this starts (as root; see tests/slurm_box.py).

    python benchmarks/slurm.py

1000 cells that sleep: until all are queued, Snakemake's memory meanwhile, until none is left after Ctrl-C. Then cells
that do nothing, one after the other: what a cell costs beside its own work. The node has one CPU, since jobs that start
take from Snakemake the cores that on a cluster are another machine's.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from slurm_box import SlurmBox, wait

WORKFLOW = """
rule all:
    default_target: True
    input:
        [f"out/{i}" for i in range(int(config["cells"]))],
rule cell:
    output:
        touch("out/{i}"),
    resources:
        runtime=5,
        mem_mb=500,
    params:
        seconds=config["seconds"],
    shell:
        "sleep {params.seconds}"
"""
QUEUED, RUN = 1000, 40


def start(folder: Path, cells: int, seconds: int) -> subprocess.Popen:
    (folder / "Snakefile").write_text(WORKFLOW)
    options = ["--executor", "submitit", "--jobs", "2000", "--submitit-poll-interval", "1", "--latency-wait", "5"]
    command = ["snakemake", *options, "--config", f"cells={cells}", f"seconds={seconds}"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure(box: SlurmBox, folder: Path) -> None:
    began, peak = time.monotonic(), 0.0
    run = start(folder, QUEUED, 600)
    while len(box.jobs()) < QUEUED:
        peak = max(peak, psutil.Process(run.pid).memory_info().rss / 1e6)
        time.sleep(0.2)
    print(f"{QUEUED} cells queued after {time.monotonic() - began:.1f} s; Snakemake's process at most {peak:.0f} MB")
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    run.wait()
    print(f"Snakemake ended {time.monotonic() - began:.1f} s after Ctrl-C", end="; ")
    wait(lambda: not box.jobs(), 120)
    print(f"no job was left after {time.monotonic() - began:.1f} s")


def measure_overhead(box: SlurmBox, folder: Path) -> None:
    began = time.monotonic()
    if start(folder, RUN, 0).wait():
        raise RuntimeError(f"{folder}: the workflow failed")
    seconds = time.monotonic() - began
    print(f"{RUN} cells that do nothing: {seconds:.1f} s, {seconds / RUN:.2f} s a cell on one core")


def main() -> None:
    for measured in (measure, measure_overhead):
        with tempfile.TemporaryDirectory(prefix="box") as place, tempfile.TemporaryDirectory() as folder:
            box = SlurmBox(Path(place), cpus=1)
            try:
                box.start()
                os.environ |= box.environment
                measured(box, Path(folder))
            finally:
                box.stop()


if __name__ == "__main__":
    main()
