"""The report: what it says about whole, holed, broken and mixed runs, and that it loads nothing and runs no text."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from fake_cells import fake_grid, fake_keys, fake_metadata, fake_rows, plan_entry, write_fake_grid

from scspec.charts import number
from scspec.report import build_report, write_table
from scspec.results import QUALITY_KEYS, QUALITY_SCHEMA, read_cell, read_cells, write_cell, write_rows
from scspec.verdicts import identity_verdicts

SMALL = {"prompts": 8, "max_new_tokens": 12}


class Page(HTMLParser):
    """Text outside scripts and styles, scripts by id or number, and every tag with its attributes."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.scripts, self._texts, self._inside = [], [], [], None
        self.feed(source)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self._texts.append(data)

    @property
    def specs(self):
        return json.loads(self.scripts[0])

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def report_of(folder, plan):
    paths = [cell["path"] for cell in plan["cells"]]
    summary = build_report(paths, plan, folder / "index.html")
    return Page((folder / "index.html").read_text(encoding="utf-8")), summary


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """(page, summary, source) of the whole fake grid."""
    folder = tmp_path_factory.mktemp("grid")
    page, summary = report_of(folder, write_fake_grid(folder / "cells", **SMALL))
    return page, summary, (folder / "index.html").read_text(encoding="utf-8")


def write(folder, *cells, **metadata):
    """Writes cells (keys, alpha) and returns the plan."""
    return write_fake_grid(folder, cells, metadata=metadata, **SMALL)


def test_a_whole_grid(grid):
    page, summary, _ = grid
    assert len(summary) == 34
    of_pairs = [f"{name}-{pair}" for pair in range(2) for name in ("alpha", "tau", "speedup")]
    assert list(page.specs) == [*of_pairs, "controls-0", "controls-1"]
    assert "cells 34 of 34 missing 0 impossible 0 prompts 8" in page.text
    assert "None: every planned cell is here." in page.text
    assert "identity holds 2 of 2 pairs computed on cpu: a processor, float32, backend cpu" in page.text
    assert "does not say that the target is good" in page.text
    assert "platforms" not in page.text
    assert "Demonstration" not in page.text
    assert page.text.count("holds (alpha is exactly 1 over 96 tokens)") == 2
    assert "BROKEN" not in page.text


def test_every_chart_has_a_sentence_and_a_text_alternative(grid):
    page, _, source = grid
    charts = [attrs for tag, attrs in page.tags if attrs.get("class") == "chart"]
    assert [attrs["id"] for attrs in charts] == list(page.specs)
    for attrs in charts:
        assert attrs["role"] == "img"
        assert page.specs[attrs["id"]]["description"] == attrs["aria-label"]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", source)
    assert len(captions) == 8
    for caption in captions:
        assert caption.count(". ") == 0
        assert caption.endswith(".")
        assert "bars are 95\xa0% intervals over prompts" in caption
        assert "streams cost" not in caption  # a draft may leave layers out


def test_the_page_says_its_language_and_title(grid):
    page, _, source = grid
    assert ("html", {"lang": "en"}) in page.tags
    assert "<title>Acceptance under stochastic computing" in source


def table_rows(source):
    """The texts of each row of the tables of cells."""
    rows = re.findall(r"<tr>\n(?:<td[^>]*>.*</td>\n)+</tr>", source)
    return [re.findall(r"<td[^>]*>(.*)</td>", row) for row in rows]


def test_the_table_holds_every_cell(grid):
    _, summary, source = grid
    rows = table_rows(source)
    assert len(rows) == len(summary)
    cell = summary[(summary["arm"] == "sc_sc") & (summary["draft_stoc_len"] == 112)].iloc[0]
    wanted = [
        "7/8 as long",
        "128 / 112",
        "8",
        "2",
        "0 / 0 / 0",
        "8",
        number(cell["alpha"]),
        f"{cell['alpha_lo']:.3f} to {cell['alpha_hi']:.3f}",
        number(cell["tau"]),
        f"{cell['tau_lo']:.3f} to {cell['tau_hi']:.3f}",
        number(cell["predicted_tau"]),
        number(cell["alpha_evaluated"]),
        number(cell["acceptance_rate"]),
        *(f"{cell[name]:.3f}" for name in ("speedup_at_once", "speedup_in_turn", "energy_ratio")),
        *("-", "-"),  # the target's quality was not measured
        "96",
        f"{cell['tokens_per_s']:.1f}",
    ]
    assert wanted in rows


def test_the_table_says_the_seed_of_each_side(grid):
    seeds = {row[0]: row[4] for row in table_rows(grid[2])}
    assert seeds["reseed: independent streams"] == "0 / 0 / 1000"
    assert seeds["identity: draft = target"] == "0 / 0 / 0"
    assert seeds["SC target, float draft"] == "0 / 0 / -"
    assert seeds["float target, SC draft"] == "0 / - / 0"
    assert seeds["float target, float draft"] == "0 / - / -"


def test_no_heading_breaks_before_its_percent_sign(grid):
    assert grid[2].count(">alpha, 95\xa0%<") == 4
    assert grid[2].count(">tau, 95\xa0%<") == 4
    shown = re.sub(r"<(script|style).*?</\1>", "", grid[2], flags=re.DOTALL)
    assert "95 %" not in shown


def test_alpha_is_not_said_to_be_free_of_gamma(grid):
    assert "else 0); estimates the same number whatever gamma is" in grid[0].text
    assert "it does not depend on gamma" not in grid[0].text


def test_provenance(grid):
    text = grid[0].text
    for part in (
        "Commit 0123456789abcdef0123456789abcdef01234567",
        "python 3.11.7, torch 2.11.0",
        "Device, dtype, SC backend cpu: a processor, float32, backend cpu: 34 cells",
        "Models source smollm2-135m, sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc7 Weights 4-bit GGUF, deq",
        "Token budget 40 tokens a turn",
        "Decoding greedy: temperature, top_k and top_p have no effect",
        "smollm2-skip: target 0.0%, draft 79.0% (float_sc)",
        "8 prompts file prompts/bench48.jsonl, sha256 5e884898da280471",
        "sampling_seed: 0 target_sc_seed: 0 draft_sc_seed: 0, 1000",
    ):
        assert part in text


def test_provenance_of_sampled_cells(tmp_path):
    page, _ = report_of(tmp_path, write(tmp_path, (fake_keys(do_sample=True), 0.6)))
    assert "Decoding sampled, temperature 0.8, top_k 50, top_p 0.95" in page.text


def test_the_table_lies_beside_the_page(grid, tmp_path):
    page, summary, _ = grid
    assert page.attributes("href") == ["index.csv", "index.parquet"]
    write_table(summary, tmp_path / "table")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), summary, check_dtype=False)
    read = pd.read_csv(tmp_path / "table.csv")
    assert read["cell_id"].tolist() == summary["cell_id"].tolist()
    assert read["alpha"].tolist() == summary["alpha"].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.parquet"]


def test_nothing_is_loaded(grid):
    """No attribute or style of the page names a place elsewhere, its own script fetches nothing, and its policy lets
    the browser refuse whatever Vega might try. tests/test_report_browser.py watches a browser."""
    page, _, source = grid
    for name in ("src", "srcset", "action", "data", "poster", "background"):
        assert page.attributes(name) == []
    assert all(re.fullmatch(r"[\w.]+", link) for link in page.attributes("href"))
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    _, _, vega, own = page.scripts
    without_vega = source.replace(vega, "")
    assert len(without_vega) < len(source) - 500_000
    for word in ("http:", "https:", "//cdn", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert word not in without_vega, word
    assert "vegaEmbed" in own


NASTY = '</script><script>alert("1")</script><b>&amp;\u2028\u202e\U0001f4a9'


def test_texts_are_shown_not_run(tmp_path):
    plan = {"demonstration": False, "cells": [], "invalid": [{"pair": NASTY, "stoc_len": 512, "reason": NASTY}]}
    prompts = {"file": NASTY, "sha256": NASTY, "token_ids_sha256": NASTY}
    for index, arm in enumerate(("sc_sc", "identity")):
        keys = fake_keys(pair=NASTY, arm=arm, target_model=NASTY, backend=NASTY)
        rows = [
            {**row, "prompt_id": NASTY + row["prompt_id"]} for row in fake_rows(keys, prompts=8, categories=(NASTY,))
        ]
        metadata = fake_metadata(keys, prompts=prompts, weights_note={"target": NASTY, "draft": NASTY}, device=NASTY)
        write_cell(tmp_path / f"{index}.parquet", rows, metadata)
        plan["cells"].append({**plan_entry(tmp_path, keys), "path": str(tmp_path / f"{index}.parquet")})
    plan["cells"].append({**plan["cells"][0], "path": NASTY})
    page, _ = report_of(tmp_path, plan)
    assert [attrs.get("id") for tag, attrs in page.tags if tag == "script"] == ["charts", "themes", None, None]
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert page.text.count(" ".join(NASTY.split())) >= 10
    rows = [row for rows in page.specs["controls-0"]["datasets"].values() for row in rows]
    assert [row["cell_id"].startswith(NASTY) for row in rows] == [True]


def test_a_demonstration_says_so(tmp_path):
    plan = write_fake_grid(tmp_path, [(fake_keys(), 0.6)], demonstration=True, **SMALL)
    page, _ = report_of(tmp_path, plan)
    assert "Demonstration, not a result" in page.text
    assert page.text.index("Demonstration") < page.text.index("cells 1 of 1")


def test_a_broken_identity_is_broken(tmp_path):
    plan = write(tmp_path, (fake_keys(arm="identity"), 0.99), (fake_keys("smollm2-skip", arm="identity"), 1))
    page, summary = report_of(tmp_path, plan)
    assert "smollm2-shorter BROKEN: the run is broken" in page.text
    assert page.text.index("BROKEN") < page.text.index("cells 2 of 2")  # an alarm at the top
    assert "smollm2-skip holds" in page.text
    assert "identity holds 1 of 2 pairs" in page.text
    assert [row["verdict"] for row in identity_verdicts(summary)] == ["BROKEN: the run is broken", "holds"]


@pytest.mark.parametrize(("name", "value"), [("beta_min", 1 - 2**-53), ("acceptance_rate", 0.999999)])
def test_identity_has_no_tolerance(grid, name, value):
    summary = grid[1].copy()
    summary.loc[(summary["arm"] == "identity") & (summary["pair"] == "smollm2-skip"), name] = value
    assert [row["verdict"][:6] for row in identity_verdicts(summary)] == ["holds", "BROKEN"]


def test_identity_that_was_not_run_does_not_hold(tmp_path):
    page, _ = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6)))
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
    page, summary = report_of(tmp_path, plan)
    assert len(summary) == 7
    assert "cells 7 of 14 missing 7 impossible 2" in page.text
    missing, impossible = page.text.index("Missing cells"), page.text.index("Combinations that cannot exist")
    for index, entry in enumerate(plan["cells"]):
        assert (entry["path"] in page.text[missing:impossible]) == (index % 2 == 0)
    assert "pair stoc_len sc_prec gamma arm reason smollm2-shorter 512 8 above 2**sc_prec" in page.text[impossible:]
    assert "smollm2-shorter 9 sc_sc not whole" in page.text[impossible:]


def test_a_single_cell(tmp_path):
    page, summary = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6)))
    assert list(page.specs) == ["alpha-0", "tau-0", "speedup-0"]
    assert len(summary) == 1


def test_controls_without_a_grid(tmp_path):
    plan = write(tmp_path, *[(fake_keys(arm=arm), 1) for arm in ("identity", "float_float")])
    page, _ = report_of(tmp_path, plan)
    assert list(page.specs) == ["controls-0"]
    assert "No cell of the grid has been run yet, only controls." in page.text


def test_no_cells(tmp_path):
    plan = {"demonstration": False, "cells": [plan_entry(tmp_path, fake_keys())], "invalid": []}
    page, summary = report_of(tmp_path, plan)
    assert summary.empty
    assert "No cell has been run yet" in page.text
    assert "cells 0 of 1 missing 1" in page.text
    assert page.scripts == []


def test_greedy_and_sampled_cells_have_charts_of_their_own(tmp_path):
    cells = [(fake_keys(arm=arm, do_sample=do_sample), 1) for arm in ("sc_sc", "identity") for do_sample in (0, 1)]
    cells = [({**keys, "do_sample": bool(keys["do_sample"])}, alpha) for keys, alpha in cells]
    page, _ = report_of(tmp_path, write(tmp_path, *cells))
    of_pairs = [f"{name}-{pair}" for pair in range(2) for name in ("alpha", "tau", "speedup")]
    assert list(page.specs) == [*of_pairs, "controls-0", "controls-1"]
    expected = {"alpha-0": "greedy", "alpha-1": "sampled", "controls-0": "greedy", "controls-1": "sampled"}
    for chart_id, decoding in expected.items():
        assert decoding in page.specs[chart_id]["description"]
    assert "share of emitted tokens on which" in page.text
    assert "overlap 1 - TV(p, q)" in page.text


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
    page, summary = report_of(tmp_path, write_two(tmp_path, keys, **metadata))
    assert len(summary) == 16
    assert page.text.count("The cells were computed on 2 platforms") == 1
    assert "no estimate here compares or pools cells across them" in page.text
    assert "identity holds 2 of 2 pairs and platforms computed on 2 platforms" in page.text
    of_pairs = [f"{name}-{pair}" for pair in range(2) for name in ("alpha", "tau", "speedup")]
    assert list(page.specs) == [*of_pairs, "controls-0", "controls-1"]
    for name, spec in page.specs.items():
        (rows,) = spec["datasets"].values()
        assert len(rows) == (5 if name.startswith("controls") else 3), name
        assert len({row["gamma"] for row in rows}) == 1, name  # gamma tells the platforms apart here
    for platform in (PLATFORM, other):
        assert f"smollm2-shorter {platform} holds (alpha is exactly 1" in page.text
        assert page.text.count(f"smollm2-shorter (greedy decoding, {platform})") == 2  # of the grid and of the controls
        for arms in ("grid", "controls"):
            assert f"smollm2-shorter, greedy: {arms} , {platform}" in page.text
        assert f"{platform}: 8 cells" in page.text


def test_identity_on_one_platform_says_nothing_of_another(tmp_path):
    plan = write_two(tmp_path, {"device": "cuda", "backend": "cuda"})
    for entry in plan["cells"]:
        if entry["arm"] == "identity" and entry["gamma"] == 4:
            Path(entry["path"]).unlink()
    page, summary = report_of(tmp_path, plan)
    verdicts = [(row["platform"], row["verdict"]) for row in identity_verdicts(summary)]
    assert verdicts == [(PLATFORM, "holds"), ("cuda: an accelerator, float32, backend cuda", "not run")]
    assert "identity holds 1 of 2 pairs and platforms" in page.text


def test_mixed_prompt_files_raise_an_alarm(tmp_path):
    page, _ = report_of(tmp_path, write_two(tmp_path, {}, prompts={"file": "x", "sha256": "0"}))
    assert "The cells come from 2 different prompt files, do not compare across" in page.text
    assert page.text.index("The cells come from") < page.text.index("cells 16 of 16")
    assert [attrs for _, attrs in page.tags if attrs.get("role") == "alert"]


def test_few_prompts_are_said_to_have_no_interval(tmp_path):
    plan = write_fake_grid(tmp_path, [(fake_keys(), 0.6), (fake_keys(arm="reseed"), 0.6)], prompts=4)
    page, _ = report_of(tmp_path, plan)
    assert page.text.count("there are no intervals below 8 prompts, so differences may be chance.") == 4
    assert "95 % intervals over prompts" not in page.text


def test_quality_stands_beside_acceptance(tmp_path):
    """Of the targets it was measured for; a float target is what the others are measured against."""
    cells = [(fake_keys(stoc_len=64), 0.6), (fake_keys(stoc_len=128), 0.7), (fake_keys(arm="float_sc"), 0.7)]
    plan = write(tmp_path / "cells", *cells)
    target = {"model": "smollm2-135m", "sc": {"sc_stoc_len": 64, "sc_prec": 8, "sc_seed": 0}}
    for entry, (keys, _) in zip(plan["cells"], cells, strict=True):
        entry.update(id=keys["cell_id"], quality=None, target=target)
    plan["cells"][0]["quality"] = str(tmp_path / "64.parquet")
    plan["cells"][1]["quality"] = str(tmp_path / "absent.parquet")
    sums = {"tokens": 10, "nll": 10 * math.log(3), "float_nll": 10 * math.log(2), "tv": 2.0, "kl": 1.0}
    row = {"source": "continuations", "category": "maths", **sums}
    rows = [{**row, "text_id": f"{number}/0"} for number in range(8)]
    rows.append({**row, "source": "text_file", "text_id": "0", "nll": 10 * math.log(4)})
    metadata = {**fake_metadata(cells[0][0]), **dict.fromkeys(QUALITY_KEYS - {"schema_version"}, "")}
    write_rows(tmp_path / "64.parquet", rows, metadata, QUALITY_SCHEMA, QUALITY_KEYS)
    for entry, (keys, _) in zip(plan["cells"], cells, strict=True):
        _, its = read_cell(entry["path"])
        its["cell"] = {name: entry[name] for name in ("id", "pair", "arm")} | {"sampling": its["cell"]["sampling"]}
        its["cell"] |= {"dtype": "float32", "max_new_tokens": 40}
        entry |= its["cell"]
        write_cell(entry["path"], fake_rows(keys, seed=1, **SMALL), its)
    page, summary = report_of(tmp_path, plan)
    losses = summary.set_index("cell_id")["quality_loss"]
    assert losses.iloc[0] == pytest.approx(3 / 2 - 1)
    assert math.isnan(losses.iloc[1])
    assert losses.iloc[2] == 0
    assert summary["target_tv"].iloc[0] == pytest.approx(0.2)
    (point,) = page.specs["quality-0"]["datasets"].popitem()[1]
    assert point["alpha"] == pytest.approx(summary["alpha"].iloc[0], abs=1e-12)
    assert page.specs["quality-0"]["description"].startswith("Acceptance alpha against the target's quality, pair")
    assert "smollm2-135m 64 8 0 continuations 80 3.000 2.000 +50.00%" in page.text
    assert "smollm2-135m 64 8 0 text file 10 4.000 2.000 +100.00% none" in page.text


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
        entry = {**plan_entry(tmp_path, its), "id": its["cell_id"], "method": its["method"]}
        metadata = fake_metadata(its)
        metadata["cell"] |= {name: entry[name] for name in ("id", "arm", "method", "gamma")}
        entry |= metadata["cell"]
        del entry["cell_id"]
        plan["cells"].append(entry)
        write_cell(entry["path"], rows, metadata)
    page, _ = report_of(tmp_path, plan)
    assert f"run as a loop too ({audit['cell_id']}): {verdict}" in page.text
    assert ("Audit of the replay: BROKEN" in page.text) == (verdict == "BROKEN")
    assert "controls-0" not in page.specs
    assert len(page.specs["alpha-0"]["datasets"].popitem()[1]) == 1


def test_a_commit_may_be_unknown_or_dirty(tmp_path):
    page, _ = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6), commit=None, dirty=None))
    assert "Commit unknown: not run from a git checkout" in page.text
    page, _ = report_of(tmp_path, write(tmp_path, (fake_keys(), 0.6), dirty=True))
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
