"""The Snakefile as users type it: what runs, what reruns, and what a failure says.

Real Snakemake, real configuration, cells and command line, in a copy of the workflow. Only what computes is
replaced: a folder of stub modules lies before the real package on its search path, and each notes its calls.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from fake_gpus import fake_nvidia_smi

from scspec.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]

NOTE = """
def note(text):
    with open("calls.txt", "a") as file:
        file.write(text + "\\n")
"""
STUBS = {
    "__init__.py": f"__path__.append({str(REPOSITORY / 'scspec')!r})\n{NOTE}",
    "run.py": """
import os
import time
from pathlib import Path
from scspec import note

def run_cell(cell, output, *, threads, prompts_per_batch, gpus):
    note(cell.id)
    assert (threads, prompts_per_batch, gpus) == (1, 2, int(os.environ.get("STUB_GPUS", 1)))
    if cell.device == "cuda":
        neighbours = list(Path().glob("*.running"))
        mine = Path(f"{os.getpid()}.running")
        mine.touch()
        time.sleep(1)
        mine.unlink()
        note("together" if neighbours else "alone")
    if cell.id == os.environ.get("STUB_FAILS"):
        raise RuntimeError("the stub was told to fail")
    output.write_text(cell.to_json())
""",
    "replay.py": """
from scspec import note

def run_trajectory(trajectory, output, *, threads, prompts_per_batch, gpus):
    note(f"text {trajectory.id}")
    output.write_text("text")

def run_predictions(predictions, trajectory_path, output, *, threads, gpus):
    note(f"predictions {predictions.id}")
    assert trajectory_path.read_text() == "text"
    output.write_text("predictions")

def replay_cell(cell, trajectory_path, predictions_path, output):
    note(cell.id)
    assert (trajectory_path.read_text(), predictions_path.read_text()) == ("text", "predictions")
    output.write_text("cell")
""",
    "quality.py": """
from scspec import note

def run_quality(quality, trajectory_path, output, *, threads, gpus):
    note(f"quality {quality.id}")
    assert trajectory_path.read_text() == "text"
    output.write_text("quality")
""",
    "models.py": """
from scspec import note

def fetch_model(name):
    note(f"fetch {name}")
    return {"name": name}
""",
    "report.py": """
import json
from pathlib import Path
from scspec import note

def report_plan(plan_path, out_path):
    note("report")
    plan = json.loads(plan_path.read_text())
    cell_paths = [cell["path"] for cell in plan["cells"] if Path(cell["path"]).exists()]
    for suffix in (".html", ".csv", ".parquet"):
        out_path.with_suffix(suffix).write_text(" ".join(map(str, cell_paths)))
    for folder in ("pairs", "cells"):
        (out_path.parent / folder).mkdir(exist_ok=True)
    for pair in {cell["pair"] for cell in plan["cells"]}:
        (out_path.parent / "pairs" / f"{pair}.html").write_text("")
""",
    "results.py": """
def atomic_file(path):
    return open(path, "wb")
""",
}
CONFIG = {
    "pairs": {
        "tiny": {"target": {"model": "a/b"}, "draft": {"model": "a/b", "stoc_len": {"ratio": [0.75, 0.5]}}},
    },
    "stoc_len": [8],
    "gamma": [2],
    "prompt_file": "prompts.jsonl",
    "prompts_per_batch": 2,
    "controls": {"arms": ["float_float", "identity"]},
    "quality": {"enabled": False},
}
GRID = ["tiny/sc_sc/L8_d6_p8_g2_s0_n0", "tiny/sc_sc/L8_d4_p8_g2_s0_n0"]
CONTROLS = ["tiny/float_float/Lf_df_pf_g2_s0_nf", "tiny/identity/L8_d8_p8_g2_s0_n0"]
CELLS = [*GRID, *CONTROLS]


class Workflow:
    """A copy of the workflow in `folder`, which is made unless it is there already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "Snakefile").exists():
            self._make(folder)

    def _make(self, folder: Path) -> None:
        for name in ("workflow", "profiles"):
            shutil.copytree(REPOSITORY / name, folder / name)
        shutil.copy(REPOSITORY / "Snakefile", folder)
        for name, text in STUBS.items():
            (folder / "stubs" / "scspec" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "stubs" / "scspec" / name).write_text(text)
        (folder / "prompts.jsonl").write_text('{"id": "1", "prompt": "Hello"}\n')
        self.configure()

    def configure(self, comment: str = "", **changes: object) -> None:
        """Write `config.yaml` with some settings changed."""
        (self.folder / "config.yaml").write_text(comment + yaml.safe_dump({**CONFIG, **changes}))

    def run(self, *arguments: str, status: int = 0, **environment: str) -> tuple[Counter, str]:
        """Return what the stubs were called for and Snakemake's messages; `status` is the wanted exit status."""
        calls = self.folder / "calls.txt"
        calls.write_text("")
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")}
        paths = {"PYTHONPATH": str(self.folder / "stubs"), "XDG_CACHE_HOME": str(self.folder / "cache")}
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
            cwd=self.folder,
            env={**clean, **paths, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
        assert done.returncode == status, done.stdout
        return Counter(calls.read_text().splitlines()), done.stdout


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter, str]:
    """A folder in which everything was built once (not to be changed), the calls for it, and the messages."""
    workflow = Workflow(tmp_path_factory.mktemp("first"))
    return workflow.folder, *workflow.run()


@pytest.fixture
def built(first_run: tuple[Path, Counter, str], tmp_path: Path) -> Workflow:
    """A copy of that folder, times included."""
    shutil.copytree(first_run[0], tmp_path, dirs_exist_ok=True)
    return Workflow(tmp_path)


def test_a_first_run_builds_everything_once(first_run: tuple[Path, Counter, str]) -> None:
    folder, calls, output = first_run
    assert calls == Counter([*CELLS, "fetch a/b", "report"])
    assert "profile profiles/default" in output
    plan = json.loads((folder / "results" / "plan.json").read_text())
    assert [cell["id"] for cell in plan["cells"]] == CELLS
    paths = [f"results/cells/{cell}.parquet" for cell in CELLS]
    for cell, path in zip(plan["cells"], paths, strict=True):
        written = json.loads((folder / path).read_text())
        assert written == {name: cell[name] for name in cell if name not in ("path", "log", "quality")}
        assert cell["log"] == f"results/logs/{cell['id']}.log"
        assert (folder / cell["log"]).exists()
    assert (folder / "reports" / "index.html").read_text().split() == paths
    assert json.loads((folder / "results" / "models" / "a--b.json").read_text()) == {"name": "a/b"}


def test_comments_threads_and_prompts_per_batch_rerun_no_cell(built: Workflow) -> None:
    built.configure(comment="# another comment\n")
    calls, output = built.run()
    assert not calls
    assert "Nothing to be done" in output
    built.configure(threads_per_cell=2, prompts_per_batch=3)
    assert built.run()[0] == Counter(["report"])  # it shows the settings


def test_snakemakes_own_report_carries_the_index_and_the_pairs(built: Workflow) -> None:
    for name in ("index", "pairs/tiny"):
        (built.folder / f"reports/{name}.html").write_text(f"the page {name}")
    assert not built.run("--report", "whole.html")[0]
    whole = (built.folder / "whole.html").read_text()
    for name in ("index", "pairs/tiny"):
        assert base64.b64encode(f"the page {name}".encode()).decode() in whole


def test_a_deleted_cell_and_a_forced_cell_run_alone_with_the_report(built: Workflow) -> None:
    (built.folder / "results" / "cells" / f"{GRID[1]}.parquet").unlink()
    assert built.run()[0] == Counter([GRID[1], "report"])
    assert built.run("-R", f"results/cells/{GRID[0]}.parquet")[0] == Counter([GRID[0], "report"])


def test_a_model_fetched_again_reruns_no_cell(built: Workflow) -> None:
    assert built.run("-R", "fetch_model")[0] == Counter(["fetch a/b"])
    assert not built.run()[0]


def test_a_value_more_on_an_axis_runs_the_new_cells_only(built: Workflow) -> None:
    built.configure(gamma=[2, 4])
    assert built.run()[0] == Counter([*(cell.replace("_g2_", "_g4_") for cell in CELLS), "report"])
    built.configure(gamma=[2])
    assert built.run()[0] == Counter(["report"])


def test_an_edited_prompt_file_reruns_every_cell(built: Workflow) -> None:
    (built.folder / "prompts.jsonl").write_text('{"id": "1", "prompt": "Goodbye"}\n')
    assert built.run()[0] == Counter([*CELLS, "report"])


def test_strings_of_the_command_line_are_what_they_spell(built: Workflow) -> None:
    calls, output = built.run("--config", "gamma=[2]", "stoc_len=[8]")  # as in the file
    assert not calls
    assert "Nothing to be done" in output
    overlay = built.folder / "overlay.yaml"
    overlay.write_text("controls: {enabled: false}\n")
    calls, _ = built.run("--configfile", str(overlay), "--config", "gamma=[4]")
    assert calls == Counter([*(cell.replace("_g2_", "_g4_") for cell in GRID), "report"])
    settings = json.loads((built.folder / "results" / "plan.json").read_text())["settings"]
    assert settings["gamma"] == [4]  # the plan is written by a nested snakemake, which must see the overrides
    assert settings["controls"]["enabled"] is False


def test_invalid_combinations_are_listed_once_and_not_run(built: Workflow) -> None:
    calls, output = built.run("--config", "stoc_len=[8,10]")
    assert set(calls) == {"tiny/identity/L10_d10_p8_g2_s0_n0", "tiny/sc_sc/L10_d5_p8_g2_s0_n0", "report"}
    assert output.count("draft stoc_len 7.5 is not a whole number") == 1
    assert json.loads((built.folder / "results" / "plan.json").read_text())["invalid"][0]["draft_stoc_len"] == 7.5


def test_as_many_cells_run_at_a_time_as_the_machines_gpus_have_room_for(built: Workflow) -> None:
    one, two = (fake_nvidia_smi(built.folder / f"{count}-gpus", count) for count in (1, 2))
    built.configure(device="cuda", backend="cuda", gpus=2)
    calls, output = built.run(STUB_GPUS="2", **two)
    assert (calls["alone"], calls["together"]) == (4, 0)  # --cores 2 alone would let two of them run
    assert "gpus=2" in output
    built.configure(device="cuda", backend="cuda")
    assert built.run(**one)[0] == Counter(["report"])  # it shows the settings
    assert not built.run("--forceall", **one)[0]["together"]
    assert built.run("--forceall", **two)[0]["together"]
    built.configure(device="cuda", backend="cuda", cells_per_gpu=2)
    assert built.run("--forceall", **one)[0]["together"]


def test_replayed_cells_share_texts_and_predictions_and_one_is_a_loop(built: Workflow) -> None:
    built.configure(method="replay", gamma=[2, 4])
    calls, _ = built.run()
    kinds = Counter(call.split()[0] if " " in call else "cell" for call in calls.elements())
    assert kinds == {"text": 2, "predictions": 4, "cell": 4 * 2 + 1 + 1}  # targets; drafts; cells, audit and report
    assert max(calls.values()) == 1
    (audit,) = [call for call in calls if "/audit/" in call]
    derived = f"{audit.replace('/audit/', '/sc_sc/')}_replay"
    assert derived in calls
    assert not built.run()[0]
    (built.folder / "results" / "cells" / f"{derived}.parquet").unlink()
    assert built.run()[0] == Counter([derived, "report"])
    built.configure(method="replay", gamma=[2, 4, 8])
    added = {call for call in built.run()[0] if "_g8_" not in call and "/audit/" not in call}
    assert added == {"report"}  # what a gamma more asks of no model


def test_quality_is_measured_once_for_each_target_whatever_gamma_is(built: Workflow) -> None:
    built.configure(quality={"enabled": True}, gamma=[2])
    kinds = Counter(call.split()[0] for call in built.run()[0])
    assert kinds == {"text": 1, "quality": 1, "report": 1}
    built.configure(quality={"enabled": True}, gamma=[2, 4], stoc_len=[8, 16])
    calls = built.run()[0]
    assert Counter(call.split()[0] for call in calls if " " in call) == {"quality": 1}
    assert "report" in calls


def test_a_failed_cell_stops_no_other_and_its_log_is_named(built: Workflow) -> None:
    shutil.rmtree(built.folder / "results" / "cells")
    calls, output = built.run("--jobs", "1", status=1, STUB_FAILS=GRID[0])
    assert calls == Counter(CELLS)  # and no report
    assert f"results/logs/{GRID[0]}.log" in output
    assert "RuntimeError: the stub was told to fail" in output  # the log itself, with its traceback
    assert built.run()[0] == Counter([GRID[0], "report"])


def test_a_mistyped_setting_stops_the_run_with_a_hint(built: Workflow) -> None:
    calls, output = built.run("--config", "gama=[2]", status=1)
    assert not calls
    assert "config: unknown key 'gama' (did you mean 'gamma'?)" in output


def test_a_prompt_file_that_is_not_understood_stops_the_run(built: Workflow) -> None:
    (built.folder / "prompts.jsonl").write_text('{"id": "1", "promt": "Hello"}\n')
    calls, output = built.run("--forceall", status=1)
    assert not calls
    assert "prompts.jsonl, line 1: unknown keys ['promt']; allowed: question_id, id, " in output


def test_the_default_experiment_plans_21_cells(built: Workflow) -> None:
    shutil.copy(REPOSITORY / "config.yaml", built.folder)
    shutil.copytree(REPOSITORY / "prompts", built.folder / "prompts")
    _, output = built.run("--dry-run", "--quiet", "rules")
    assert ["cell", "21"] in [line.split() for line in output.splitlines()]


def test_the_command_line_lists_the_plan(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "smollm2-distilled/sc_sc/L128_d128_p8_g4_s0_n0"
    assert lines[21] == "21 cells, 0 invalid combinations"
    assert lines[22].startswith("Estimate for backend cpu, not a measurement.")
