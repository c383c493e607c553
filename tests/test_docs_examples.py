"""Examples of the documentation run: Python blocks as they stand, command lines as far as their options."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from documents import CURRENT, REPOSITORY, document
from fake_cells import fake_grid, write_fake_grid
from report_pages import SMALL

from scspec.cells import expand
from scspec.config import load_experiment, read_config

WITH_PYTHON = [doc for doc in CURRENT if doc.blocks("python")]
#: Snakemake's own parser over lists of arguments, one start for all.
PARSE = """
import json, sys
from snakemake.cli import parse_args
for line in json.load(sys.stdin):
    parse_args(line)
print("parsed")
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "300"}


def commands(program: str) -> list[str]:
    """The command lines of a program in the documents: code, and lines of blocks; each once."""
    found = [code for doc in CURRENT for code in doc.code]
    found += [line for doc in CURRENT for block in doc.blocks("sh", "bash") for line in block.splitlines()]
    return sorted({text.split("  #")[0] for text in found if text.startswith(f"{program} ")})


def run(*command: str, given: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, input=given, capture_output=True, text=True)


@pytest.mark.parametrize("doc", WITH_PYTHON, ids=lambda doc: str(doc.path.relative_to(REPOSITORY)))
def test_python_blocks_run(doc, tmp_path, monkeypatch, capsys):
    """Those of a document one after the other, beside a folder of results."""
    write_fake_grid(tmp_path / "results" / "cells", fake_grid(), **SMALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(doc.blocks("python")):
        exec(compile(block, f"{doc.path.name}, python block {number}", "exec"), names)
    if doc.path.name == "README.md":
        assert "Paris" in capsys.readouterr().out


def test_readme_has_an_example_in_python():
    assert document("README.md") in WITH_PYTHON


@pytest.mark.parametrize("line", commands("scspec"))
def test_scspecs_command_lines_name_commands_and_options_that_exist(line):
    words = shlex.split(line)[1:]
    command = [word for word in words if re.fullmatch("[a-z][a-z-]*", word)]
    shown = run(sys.executable, "-m", "scspec", *command, "--help")
    assert shown.returncode == 0, shown.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.stdout


def test_snakemakes_command_lines_parse():
    lines = [shlex.split(line)[1:] for line in commands("snakemake")]
    lines.remove(["--help"])  # ends the process that parses it
    parsed = run(sys.executable, "-c", PARSE, given=json.dumps(lines))
    assert parsed.stdout == "parsed\n", parsed.stderr
    assert ["--cores", "all"] in lines


def buildable(line: str) -> bool:
    """Whether it is a whole command that builds: a dry run can follow it to its jobs."""
    return "--cores" in line and "KEY" not in line


@pytest.mark.parametrize("line", [line for line in commands("snakemake") if buildable(line)])
def test_snakemakes_command_lines_plan_jobs(line):
    cells, _ = expand(load_experiment(read_config(REPOSITORY / "config.yaml")))
    line = line.replace("results/cells/PAIR/ARM/CELL.parquet", str(cells[0].path()))
    planned = run(sys.executable, "-m", *shlex.split(line), "--dry-run", "--quiet")
    assert planned.returncode == 0, planned.stdout + planned.stderr
