"""The report: what it says about whole, holed, broken and mixed runs, and that it loads nothing and runs no text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from fake_cells import fake_grid, fake_keys, fake_metadata, fake_rows, plan_entry, write_fake_grid

from scspec.charts import number
from scspec.report import build_report, identity_verdicts, write_table
from scspec.results import write_cell

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
    assert list(page.specs) == ["alpha-0", "tau-0", "alpha-1", "tau-1", "controls-greedy"]
    assert "cells 34 of 34 missing 0 impossible 0 prompts 8" in page.text
    assert "None: every planned cell is here." in page.text
    assert "does not say that the SC target is good" in page.text
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
    assert len(captions) == 5
    for caption in captions:
        assert caption.count(". ") == 0
        assert caption.endswith(".")


def test_the_page_says_its_language_and_title(grid):
    page, _, source = grid
    assert ("html", {"lang": "en"}) in page.tags
    assert "<title>Acceptance under stochastic computing" in source


def test_the_table_holds_every_cell(grid):
    _, summary, source = grid
    rows = re.findall(r"<tr>\n(?:<td[^>]*>.*</td>\n)+</tr>", source)
    assert len(rows) == len(summary)
    cell = summary[(summary["arm"] == "sc_sc") & (summary["draft_stoc_len"] == 112)].iloc[0]
    wanted = [
        "7/8 as long",
        "128 / 112",
        "8",
        "2",
        "0 / 0",
        "8",
        number(cell["alpha"]),
        f"{cell['alpha_lo']:.3f} to {cell['alpha_hi']:.3f}",
        number(cell["tau"]),
        f"{cell['tau_lo']:.3f} to {cell['tau_hi']:.3f}",
        number(cell["predicted_tau"]),
        number(cell["alpha_evaluated"]),
        number(cell["acceptance_rate"]),
        "96",
        f"{cell['tokens_per_s']:.1f}",
    ]
    assert wanted in [re.findall(r"<td[^>]*>(.*)</td>", row) for row in rows]


def test_provenance(grid):
    text = grid[0].text
    for part in (
        "Commit 0123456789abcdef0123456789abcdef01234567",
        "python 3.11.7, torch 2.11.0",
        "Device cpu: a processor",
        "SC backend cpu",
        "source smollm2-135m, sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc7",
        "weights: 4-bit GGUF, dequantised",
        "smollm2-skip: target 0.0%, draft 79.0% (float_sc)",
        "8 prompts file prompts/bench48.jsonl, sha256 5e884898da280471",
        "sampling_seed: 0 sc_seed: 0",
    ):
        assert part in text


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
        keys = fake_keys(pair=NASTY, arm=arm, target_model=NASTY, device=NASTY)
        rows = [
            {**row, "prompt_id": NASTY + row["prompt_id"]} for row in fake_rows(keys, prompts=8, categories=(NASTY,))
        ]
        metadata = fake_metadata(keys, prompts=prompts, weights_note={"target": NASTY, "draft": NASTY})
        write_cell(tmp_path / f"{index}.parquet", rows, metadata)
        plan["cells"].append({**plan_entry(tmp_path, keys), "path": str(tmp_path / f"{index}.parquet")})
    plan["cells"].append({**plan["cells"][0], "path": NASTY})
    page, _ = report_of(tmp_path, plan)
    assert [attrs.get("id") for tag, attrs in page.tags if tag == "script"] == ["charts", "themes", None, None]
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert page.text.count(" ".join(NASTY.split())) >= 10
    rows = [row for rows in page.specs["controls-greedy"]["datasets"].values() for row in rows]
    assert {row["pair"] for row in rows} == {NASTY}


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
    assert list(page.specs) == ["alpha-0", "tau-0"]
    assert len(summary) == 1


def test_controls_without_a_grid(tmp_path):
    plan = write(tmp_path, *[(fake_keys(arm=arm), 1) for arm in ("identity", "float_float")])
    page, _ = report_of(tmp_path, plan)
    assert list(page.specs) == ["controls-greedy"]
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
    assert list(page.specs) == ["alpha-0", "tau-0", "alpha-1", "tau-1", "controls-greedy", "controls-sampled"]
    for chart_id, decoding in {"alpha-0": "greedy", "alpha-1": "sampled"}.items():
        assert decoding in page.specs[chart_id]["description"]
    assert "share of emitted tokens on which" in page.text
    assert "overlap 1 - TV(p, q)" in page.text


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ({"device": "cuda: an accelerator"}, "2 different devices, do not compare across: cpu: a processor; cuda"),
        ({"backend": "reference"}, "2 different backends"),
        ({"prompts": {"file": "x", "sha256": "0"}}, "2 different prompt files"),
    ],
)
def test_mixed_origins_raise_an_alarm(tmp_path, changes, alarm):
    plan = write(tmp_path, (fake_keys(), 0.6))
    keys = fake_keys(gamma=2)
    entry = plan_entry(tmp_path, keys)
    write_cell(entry["path"], fake_rows(keys, **SMALL), fake_metadata(keys, **changes))
    plan["cells"].append(entry)
    page, _ = report_of(tmp_path, plan)
    assert f"The cells come from {alarm}" in page.text
    assert page.text.index("The cells come from") < page.text.index("cells 2 of 2")
    assert [attrs for _, attrs in page.tags if attrs.get("role") == "alert"]


def test_few_prompts_are_said_to_have_no_interval(tmp_path):
    plan = write_fake_grid(tmp_path, [(fake_keys(), 0.6)], prompts=4)
    page, _ = report_of(tmp_path, plan)
    assert page.text.count("there are no intervals below 8 prompts, so differences may be chance.") == 2
    assert "95 % intervals over prompts" not in page.text


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
