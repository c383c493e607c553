"""The report's index, and what holds of all pages: whole, holed, broken and mixed runs; nothing is loaded or run.

Not here: what a pair's page shows (test_report_pair.py), a cell's (test_report_cell.py), the headline.
"""

import re
from pathlib import Path

import pandas as pd
import pytest
from fake_cells import fake_grid, fake_keys, fake_metadata, fake_rows, plan_entry, write_fake_grid
from report_pages import SMALL, Page, report_of, write

from scspec.report import write_table
from scspec.report.verdicts import identity_verdicts
from scspec.results import read_cells, write_cell


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The report of the whole fake grid."""
    folder = tmp_path_factory.mktemp("grid")
    return report_of(folder, write_fake_grid(folder / "data", **SMALL))


def test_a_whole_grid(grid):
    page = grid.index
    assert len(grid.summary) == 34
    assert "cells 34 of 34 failed 0 missing 0 impossible 0 prompts 8" in page.text
    assert "None: every planned cell is here." in page.text
    assert "identity holds 2 of 2 pairs computed on cpu: a processor, float32, backend cpu" in page.text
    assert "does not say that the target is good" in page.text
    assert "platforms" not in page.text
    assert "Demonstration" not in page.text
    assert page.text.count("holds (alpha is exactly 1 over 96 tokens)") == 2
    assert "BROKEN" not in page.text


def test_links_between_the_pages_lead_to_pages(grid):
    pages = sorted(grid.folder.rglob("*.html"))
    assert len(pages) == 1 + 2 + 34
    reached = {grid.folder / "index.html"}
    for path in pages:
        for link in Page(path).attributes("href"):
            target = path.parent.joinpath(link.split("#")[0]).resolve() if link[0] != "#" else path
            assert target.exists(), f"{path}: {link}"
            reached.add(target)
    assert reached >= set(pages)


def test_pages_say_their_language_and_title(grid):
    for page in (grid.index, grid.pair(), grid.cell(grid.summary["cell_id"].iloc[0])):
        assert ("html", {"lang": "en"}) in page.tags
    assert "<title>Acceptance under stochastic computing" in grid.index.source
    assert "<title>smollm2-shorter" in grid.pair().source


def test_the_controls_stand_on_the_index(grid):
    assert "smollm2-shorter identity: draft = target 256 / 256 4 1" in grid.index.text
    assert "smollm2-skip float target, SC draft float / 256 4 0." in grid.index.text


def test_provenance(grid):
    text = grid.index.text
    for part in (
        "Commit 0123456789abcdef0123456789abcdef01234567",
        "python 3.11.7, torch 2.11.0",
        "Device, dtype, SC backend cpu: a processor, float32, backend cpu: 34 cells",
        "Models source smollm2-135m, sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc7 Weights 4-bit GGUF, deq",
        "Token budget 40 tokens a turn, unless a prompt has its own",
        "Decoding greedy: temperature, top_k and top_p have no effect",
        "smollm2-skip: target 0.0%, draft 79.0% (float_sc)",
        "8 prompts file prompts/bench48.jsonl, sha256 5e884898da280471",
        "target: 64, 128, 256 clock cycles a product",
        "sampling_seed: 0 target_sc_seed: 0 draft_sc_seed: 0, 1000",
    ):
        assert part in text


def test_provenance_of_sampled_cells(tmp_path):
    page = report_of(tmp_path, write(tmp_path, (fake_keys(do_sample=True), 0.6))).index
    assert "Decoding sampled, temperature 0.8, top_k 50, top_p 0.95" in page.text


def test_the_table_lies_beside_the_page(grid, tmp_path):
    assert {"index.csv", "index.parquet"} <= set(grid.index.attributes("href"))
    write_table(grid.summary, tmp_path / "table")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), grid.summary, check_dtype=False)
    read = pd.read_csv(tmp_path / "table.csv")
    assert read["cell_id"].tolist() == grid.summary["cell_id"].tolist()
    assert read["alpha"].tolist() == grid.summary["alpha"].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.parquet"]


def test_nothing_is_loaded(grid):
    """No attribute or style of a page names a place elsewhere, its own script fetches nothing, and its policy lets
    the browser refuse whatever Vega might try. tests/test_report_browser.py watches a browser."""
    for page in (grid.index, grid.pair(), grid.cell(grid.summary["cell_id"].iloc[0])):
        for name in ("src", "srcset", "action", "data", "poster", "background"):
            assert page.attributes(name) == []
        assert all(re.fullmatch(r"[\w./#-]+", link) for link in page.attributes("href"))
        (policy,) = [its["content"] for _, its in page.tags if its.get("http-equiv") == "Content-Security-Policy"]
        assert policy.startswith("default-src 'none';")
        assert "http" not in policy
        without_vega = page.source
        if page.specs:
            _, _, vega, own = page.scripts
            without_vega = page.source.replace(vega, "")
            assert len(without_vega) < len(page.source) - 500_000
            assert "vegaEmbed" in own
        for word in ("http:", "https:", "//cdn", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
            assert word not in without_vega, word


NASTY = '</script><script>alert("1")</script><b>&amp;\u2028\u202e\U0001f4a9'


def test_texts_are_shown_not_run(tmp_path):
    """A pair's name is a file's name too, so the schema of config.yaml lets it be nothing but plain."""
    plan = {"demonstration": False, "cells": [], "invalid": [{"pair": NASTY, "stoc_len": 512, "reason": NASTY}]}
    prompts = {"file": NASTY, "sha256": NASTY, "token_ids_sha256": NASTY}
    for index, arm in enumerate(("sc_sc", "identity")):
        keys = fake_keys(arm=arm, target_model=NASTY, backend=NASTY)
        rows = [
            {**row, "prompt_id": NASTY + row["prompt_id"]} for row in fake_rows(keys, prompts=8, categories=(NASTY,))
        ]
        metadata = fake_metadata(keys, prompts=prompts, weights_note={"target": NASTY, "draft": NASTY}, device=NASTY)
        write_cell(tmp_path / f"{index}.parquet", rows, metadata)
        plan["cells"].append({**plan_entry(tmp_path, keys), "path": str(tmp_path / f"{index}.parquet")})
    (tmp_path / "log").write_text(NASTY)
    plan["cells"].append({**plan["cells"][0], "path": NASTY, "log": str(tmp_path / "log")})
    report = report_of(tmp_path, plan)
    pages = [report.index, report.pair(), *(report.cell(cell_id) for cell_id in report.summary["cell_id"])]
    for page, scripts in zip(pages, (1, 4, 0, 0), strict=True):
        tags = [tag for tag, _ in page.tags]
        assert tags.count("script") == scripts
        assert scripts == 0 or "b" not in tags  # a cell's page sets bonus tokens in bold
        assert "alert" in page.text
    assert report.index.text.count(" ".join(NASTY.split())) >= 8
    rows = [row for rows in report.pair().specs["categories-0"]["datasets"].values() for row in rows]
    assert {row["category"] for row in rows if "category" in row} == {NASTY}


def test_a_demonstration_says_so(tmp_path):
    plan = write_fake_grid(tmp_path, [(fake_keys(), 0.6)], demonstration=True, **SMALL)
    page = report_of(tmp_path, plan).index
    assert "Demonstration, not a result" in page.text
    assert page.text.index("Demonstration") < page.text.index("cells 1 of 1")


def test_a_broken_identity_is_broken(tmp_path):
    plan = write(tmp_path, (fake_keys(arm="identity"), 0.99), (fake_keys("smollm2-skip", arm="identity"), 1))
    report = report_of(tmp_path, plan)
    page, summary = report.index, report.summary
    assert "smollm2-shorter BROKEN: the run is broken" in page.text
    assert page.text.index("BROKEN") < page.text.index("cells 2 of 2")  # an alarm at the top
    assert "smollm2-skip holds" in page.text
    assert "identity holds 1 of 2 pairs" in page.text
    assert [row["verdict"] for row in identity_verdicts(summary)] == ["BROKEN: the run is broken", "holds"]


@pytest.mark.parametrize(("name", "value"), [("beta_min", 1 - 2**-53), ("acceptance_rate", 0.999999)])
def test_identity_has_no_tolerance(grid, name, value):
    summary = grid.summary.copy()
    summary.loc[(summary["arm"] == "identity") & (summary["pair"] == "smollm2-skip"), name] = value
    assert [row["verdict"][:6] for row in identity_verdicts(summary)] == ["holds", "BROKEN"]


def test_identity_that_was_not_run_does_not_hold(tmp_path):
    page = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6))).index
    assert "smollm2-shorter not run" in page.text
    assert "identity holds 0 of 1 pairs" in page.text


def test_holes_and_impossible_combinations_are_listed_apart(tmp_path):
    invalid = [
        {"pair": "smollm2-shorter", "stoc_len": 512, "sc_prec": 8, "gamma": None, "reason": "above 2**sc_prec"},
        {"pair": "smollm2-shorter", "arm": "sc_sc", "stoc_len": 9, "reason": "not whole"},
    ]
    plan = write_fake_grid(tmp_path, fake_grid(stoc_lens=(64,), gammas=(2,)), invalid=invalid, **SMALL)
    for entry in plan["cells"][::2]:
        Path(entry["path"]).unlink()
    report = report_of(tmp_path, plan)
    page, summary = report.index, report.summary
    assert len(summary) == 7
    assert "cells 7 of 14 failed 0 missing 7 impossible 2" in page.text
    missing, impossible = page.text.index("What is missing"), page.text.index("Combinations that cannot exist")
    for index, entry in enumerate(plan["cells"]):
        assert (entry["path"] in page.text[missing:impossible]) == (index % 2 == 0)
    assert "pair stoc_len sc_prec gamma arm reason smollm2-shorter 512 8 above 2**sc_prec" in page.text[impossible:]
    assert "smollm2-shorter 9 sc_sc not whole" in page.text[impossible:]


def test_failed_cells_say_what_their_log_ends_with(tmp_path):
    plan = write(tmp_path, (fake_keys(), 0.6), (fake_keys(gamma=2), 0.6))
    lost = plan["cells"][1]
    Path(lost["path"]).unlink()
    lost["log"] = str(tmp_path / "cell.log")
    Path(lost["log"]).write_text("Traceback\nValueError: prompts/x.jsonl:3: <no prompt>\n")
    page = report_of(tmp_path, plan).index
    assert "cells 1 of 2 failed 1 missing 0" in page.text
    assert f"{lost['path']} {lost['log']} ends: ValueError: prompts/x.jsonl:3: <no prompt>" in page.text
    assert "every planned cell is here" not in page.text


def test_no_cells(tmp_path):
    plan = {"demonstration": False, "cells": [plan_entry(tmp_path, fake_keys())], "invalid": []}
    report = report_of(tmp_path, plan)
    assert report.summary.empty
    assert "No cell has been run yet" in report.index.text
    assert "cells 0 of 1 failed 0 missing 1" in report.index.text
    assert report.index.scripts == []


def write_two(folder, changed_keys, **changed_metadata):
    """Writes one pair's cells at gamma 2, and at gamma 4 with something changed, each a grid cell and its controls."""
    same = fake_grid(pairs=("smollm2-shorter",), stoc_lens=(64,), gammas=(2,))
    other = fake_grid(pairs=("smollm2-shorter",), stoc_lens=(64,), gammas=(4,), **changed_keys)
    plans = [write(folder, *same), write(folder, *other, **changed_metadata)]
    return {**plans[0], "cells": plans[0]["cells"] + plans[1]["cells"]}


PLATFORM = "cpu: a processor, float32, backend cpu"
OTHERS = {
    "cuda: an accelerator, float32, backend cuda": ({"device": "cuda", "backend": "cuda"}, {}),
    "cpu: a processor, float32, backend reference": ({"backend": "reference"}, {}),
    "cpu: another processor, float32, backend cpu": ({}, {"device": "cpu: another processor"}),
    "cpu: a processor, bfloat16, backend cpu": (
        {},
        {"cell": {**fake_metadata(fake_keys())["cell"], "dtype": "bfloat16"}},
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_platforms_stand_apart(tmp_path, other):
    keys, metadata = OTHERS[other]
    report = report_of(tmp_path, write_two(tmp_path, keys, **metadata))
    page, pair = report.index, report.pair()
    assert len(report.summary) == 16
    assert page.text.count("The cells were computed on 2 platforms") == 1
    assert "no estimate here compares or pools cells across them" in page.text
    assert "identity holds 2 of 2 pairs and platforms computed on 2 platforms" in page.text
    assert {name.split("-")[1] for name in pair.specs} == {"0", "1"}
    for name, spec in pair.specs.items():
        rows = [row for rows in spec["datasets"].values() for row in rows]
        assert len({row["gamma"] for row in rows if "gamma" in row}) <= 1, name  # gamma tells the platforms apart here
    for platform in (PLATFORM, other):
        assert f"smollm2-shorter {platform} holds (alpha is exactly 1" in page.text
        assert f"smollm2-shorter greedy decoding, {platform}; 8 cells" in page.text
        assert f"Greedy decoding ({platform})" in pair.text
        for arms in ("grid", "controls"):
            assert f"smollm2-shorter, greedy: {arms} ({platform})" in pair.text
        assert f"{platform}: 8 cells" in page.text


def test_identity_on_one_platform_says_nothing_of_another(tmp_path):
    plan = write_two(tmp_path, {"device": "cuda", "backend": "cuda"})
    for entry in plan["cells"]:
        if entry["arm"] == "identity" and entry["gamma"] == 4:
            Path(entry["path"]).unlink()
    report = report_of(tmp_path, plan)
    page, summary = report.index, report.summary
    verdicts = [(row["platform"], row["verdict"]) for row in identity_verdicts(summary)]
    assert verdicts == [(PLATFORM, "holds"), ("cuda: an accelerator, float32, backend cuda", "not run")]
    assert "identity holds 1 of 2 pairs and platforms" in page.text


def test_mixed_prompt_files_raise_an_alarm(tmp_path):
    page = report_of(tmp_path, write_two(tmp_path, {}, prompts={"file": "x", "sha256": "0"})).index
    assert "The cells come from 2 different prompt files, do not compare across" in page.text
    assert page.text.index("The cells come from") < page.text.index("cells 16 of 16")
    assert [attrs for _, attrs in page.tags if attrs.get("role") == "alert"]


def replayed(keys):
    return {**keys, "cell_id": f"{keys['cell_id']}_replay", "method": "replay"}


@pytest.mark.parametrize(("seed", "verdict"), [(0, "holds"), (1, "BROKEN")])
def test_an_audit_compares_a_loop_with_its_replay(tmp_path, seed, verdict):
    keys, plan = fake_keys(), {"demonstration": False, "cells": [], "invalid": []}
    audit = {**keys, "cell_id": keys["cell_id"].replace("sc_sc", "audit"), "arm": "audit"}
    for its, its_seed in ((replayed(keys), 0), (audit, seed)):
        rows = fake_rows(its, seed=its_seed, **SMALL)
        if its["method"] == "replay":
            for row in rows:
                row.update(draft_time_s=None, verify_time_s=None)
                row["proposed_ids"] = row["proposed_ids"][: row["accepted"] + 1]
        entry = {**plan_entry(tmp_path, its), "id": its["cell_id"], "method": its["method"], "log": its["cell_id"]}
        metadata = fake_metadata(its)
        metadata["cell"] |= {name: entry[name] for name in ("id", "arm", "method", "gamma")}
        entry |= metadata["cell"]
        del entry["cell_id"]
        plan["cells"].append(entry)
        write_cell(entry["path"], rows, metadata)
    report = report_of(tmp_path, plan)
    page, pair = report.index, report.pair()
    assert f"run as a loop too ({audit['cell_id']}): {verdict}" in page.text
    assert ("Audit of the replay: BROKEN" in page.text) == (verdict == "BROKEN")
    assert "controls-0" not in pair.specs
    assert len(pair.specs["alpha-0"]["datasets"].popitem()[1]) == 1


def test_a_commit_may_be_unknown_or_dirty(tmp_path):
    page = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6), commit=None, dirty=None)).index
    assert "Commit unknown: not run from a git checkout" in page.text
    page = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6), dirty=True)).index
    assert "01234567, with uncommitted changes" in page.text


def test_a_torn_or_false_cell_stops_the_report_and_leaves_the_old_one(tmp_path):
    plan = write(tmp_path, (fake_keys(), 0.6))
    report_of(tmp_path, plan)
    before = (tmp_path / "index.html").read_bytes()
    path = Path(plan["cells"][0]["path"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=path.name):
        report_of(tmp_path, plan)
    rows = fake_rows(fake_keys(), **SMALL)
    rows[0]["kept"] += 1
    write_cell(path, rows, fake_metadata(fake_keys()))
    with pytest.raises(ValueError, match="kept is outside"):
        report_of(tmp_path, plan)
    assert (tmp_path / "index.html").read_bytes() == before


def test_a_cell_made_with_other_settings_than_planned_stops_the_report(tmp_path):
    plan = write(tmp_path, (fake_keys(), 0.6))
    (planned,) = plan["cells"]
    (metadata,) = read_cells([planned["path"]])[1].values()
    planned.update(metadata["cell"], id=fake_keys()["cell_id"])
    report_of(tmp_path, plan)
    planned["max_new_tokens"] = metadata["cell"]["max_new_tokens"] + 1
    with pytest.raises(ValueError, match=f"{planned['path']}: made with other settings than planned .max_new_tokens."):
        report_of(tmp_path, plan)
