"""The report in headless Chromium: it asks for nothing, complains of nothing, every chart is drawn and answers.

Skipped where there is no Chromium, except in CI (CI=true), where that is a failure.
"""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from fake_cells import fake_keys, write_fake_grid
from report_pages import report_of, write_measured

from scspec.charts import THEMES

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", *QUIET.split()]
SCHEMES = {"dark": 0, "light": 1}  # blink's preferredColorScheme


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a grid."""
    if CHROMIUM is None:
        assert os.environ.get("CI") != "true", f"none of {NAMES} is on the PATH"
        pytest.skip(f"none of {NAMES} is on the PATH")
    folder = tmp_path_factory.mktemp("report")
    return report_of(folder, write_fake_grid(folder / "data", prompts=8, max_new_tokens=12))


@pytest.fixture(scope="module")
def page(report):
    """The page of a pair, as a string."""
    return report.pair().source


def visit(folder, page, scheme="light", width_px=1280):
    """(document after its scripts ran, console lines, addresses the page asked for)."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    return visit_file(folder, folder / "page.html", scheme, width_px)


def visit_file(folder, path, scheme="light", width_px=1280):
    log = folder / "net.json"
    command = [
        *(CHROMIUM, *FLAGS, "--enable-logging=stderr", "--v=0"),
        *(f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"),
        *(f"--window-size={width_px},900", "--dump-dom", f"file://{path}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, _requests(json.loads(log.read_text(encoding="utf-8")))


def _requests(log):
    """Addresses of requests that a page began; those of Chromium itself have no origin as their initiator."""
    kind = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [event["params"] for event in log["events"] if event["type"] == kind and "params" in event]
    return [params["url"] for params in started if params.get("initiator", "not an origin") != "not an origin"]


def without_policy(page):
    stripped, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    return stripped


def probed(page, script, early=False):
    """The page with one script more, which runs when its charts are drawn, or before they are; `note(name, value)`
    leaves an attribute."""
    (nonce,) = set(re.findall(r'nonce="(\w+)"', page))
    note = "const note = (name, value) => document.documentElement.setAttribute('data-' + name, JSON.stringify(value));"
    wrapped = f"{{ {note} {script} }}" if early else f"setTimeout(async () => {{ {note} {script} }}, 5000);"
    place = '<script type="application/json" id="charts">' if early else "</body>"
    before, _, after = page.rpartition(place)  # Vega has a body in a string
    return f'{before}<script nonce="{nonce}">{wrapped}</script>{place}{after}'


def noted(document, name):
    (value,) = re.findall(rf'<html[^>]* data-{name}="(.*?)"', document)
    return json.loads(html.unescape(value))


def charts_of(document):
    """id -> the drawn content of each chart."""
    return dict(re.findall(r'<div id="([\w-]+)" class="chart[^>]*>(.*?)<figcaption>', document, re.DOTALL))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_chart_is_drawn_in_the_colours_of_the_page(tmp_path, report, page, scheme):
    document, console, requests = visit(tmp_path, page, scheme)
    assert (console, requests) == ([], [])
    specs, drawn = report.pair().specs, charts_of(document)
    assert list(drawn) == list(specs)
    for name, svg in drawn.items():
        assert len(re.findall(r'aria-roledescription="(?:point|circle|rect mark|symbol)"', svg)) > 2, name
        assert THEMES[scheme]["axis"]["titleColor"] in svg
    grid = report.summary[(report.summary["pair"] == "smollm2-shorter") & (report.summary["arm"] == "sc_sc")]
    for name in ("alpha-0", "tau-0"):
        assert len(re.findall(r'aria-roledescription="point"', drawn[name])) == len(grid)


def test_all_kinds_of_pages_open_without_a_word(tmp_path, report):
    paths = [report.folder / "index.html", next(report.folder.glob("cells/*/identity/*.html"))]
    for path in paths:
        document, console, requests = visit_file(tmp_path, path)
        assert (console, requests) == ([], []), path
        assert "<h1>" in document


LEGEND = """
  const drawing = id => document.querySelector("#" + id + " svg").outerHTML;
  const before = {alpha: drawing("alpha-0"), tau: drawing("tau-0"), controls: drawing("controls-0")};
  const entry = document.querySelector("#alpha-0 .role-legend-symbol path");
  entry.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  await new Promise(done => setTimeout(done, 1000));
  note("changed", Object.keys(before).filter(name => before[name] !== drawing(name + "-0")));
  const faint = [...document.querySelectorAll("#tau-0 .mark-symbol path[aria-roledescription=point]")]
    .filter(point => point.getAttribute("opacity") === "0.12");
  note("faint", faint.length);
"""


def test_a_click_in_a_legend_isolates_a_draft_in_all_charts(tmp_path, report, page):
    document, console, _ = visit(tmp_path, probed(page, LEGEND))
    assert console == []
    assert noted(document, "changed") == ["alpha", "tau"]
    grid = report.summary[(report.summary["pair"] == "smollm2-shorter") & (report.summary["arm"] == "sc_sc")]
    assert noted(document, "faint") == len(grid) * 2 / 3  # of three drafts one is picked


EARLY = """
  const point = ".mark-symbol path[aria-roledescription=point][opacity='0.12']";
  const faint = id => document.querySelectorAll(`#${id} ${point}`).length;
  new MutationObserver((_, observer) => {
    const entry = document.querySelector("#alpha-0 .role-legend-symbol path");
    if (!entry) return;
    observer.disconnect();
    note("later", document.querySelector("#tau-0 svg") === null);
    entry.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  }).observe(document.getElementById("alpha-0"), {childList: true, subtree: true});
  setTimeout(() => note("faint", [faint("alpha-0"), faint("tau-0")]), 6000);
"""


def test_a_draft_picked_before_all_charts_are_drawn_is_picked_in_those_that_follow(tmp_path, report, page):
    document, console, _ = visit(tmp_path, probed(page, EARLY, early=True))
    assert console == []
    assert noted(document, "later") is True
    grid = report.summary[(report.summary["pair"] == "smollm2-shorter") & (report.summary["arm"] == "sc_sc")]
    assert noted(document, "faint") == [len(grid) * 2 / 3] * 2


SLIDER = """
  const box = document.getElementById("hardware-0");
  const drawing = () => box.querySelector("svg").outerHTML;
  const changes = [];
  for (const slider of box.querySelectorAll("input[type=range]")) {
    const before = drawing();
    slider.value = slider.value === slider.min ? slider.max : slider.min;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    await new Promise(done => setTimeout(done, 500));
    changes.push(before !== drawing());
  }
  note("changes", changes);
"""


def test_sliders_redraw_the_hardware_model(tmp_path, page):
    document, console, _ = visit(tmp_path, probed(page, SLIDER))
    assert console == []
    assert noted(document, "changes") == [True, True]


MEASURE = """
  const box = element => [element.scrollWidth, element.clientWidth];
  note("sizes", [box(document.documentElement), ...Array.from(document.querySelectorAll(".chart"), box)]);
"""


@pytest.mark.parametrize(("width_px", "scrolls"), [(1280, False), (800, False), (500, True)])
def test_charts_take_the_width_there_is_and_scroll_within_themselves(tmp_path, page, width_px, scrolls):
    document, console, _ = visit(tmp_path, probed(page, MEASURE), width_px=width_px)
    assert console == []
    whole, *charts = noted(document, "sizes")
    assert whole[0] == whole[1]
    sizes = dict(zip(charts_of(document), charts, strict=True))
    for name, (content, box) in sizes.items():
        assert box == whole[1] - 40
        assert scrolls or content <= box, name
    assert (sizes["alpha-0"][0] > sizes["alpha-0"][1]) == scrolls  # two panels


def test_nothing_is_asked_for_even_where_it_would_be_allowed(tmp_path, page):
    _, console, requests = visit(tmp_path, without_policy(page))
    assert (console, requests) == ([], [])


def test_a_request_or_an_error_would_be_seen(tmp_path, page):
    probe = '</h1><img src="https://probe.invalid/x.png"><script>undefined_name</script>'
    _, console, requests = visit(tmp_path, without_policy(page).replace("</h1>", probe, 1))
    assert requests == ["https://probe.invalid/x.png"]
    assert any("undefined_name" in line for line in console)


def test_the_policy_blocks_what_the_page_does_not_ask_for(tmp_path, page):
    probe = '</h1><img src="https://probe.invalid/x.png"><script>document.title = "ran"</script>'
    document, console, requests = visit(tmp_path, page.replace("</h1>", probe, 1))
    assert requests == []
    assert len(console) == 2
    assert "<title>ran" not in document


CARD = """
  const card = document.querySelector(".card");
  const slider = card.querySelector("input"), texts = [];
  for (const value of [slider.min, slider.max]) {
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    texts.push([...card.querySelectorAll("[data-show]")].map(part => part.textContent));
  }
  note("texts", texts);
"""


def test_the_slider_of_a_card_moves_its_headline(tmp_path):
    cells = (fake_keys(stoc_len=64, draft_stoc_len=16), 1, 3), (fake_keys(draft_stoc_len=64), 1, 2.25)
    index = report_of(tmp_path, write_measured(tmp_path, *cells)).index
    assert "keeps the rise of its perplexity within +5%. This is what the nearest allows: 1.667 \xd7" in index.text
    assert "Accepted rise of the target's perplexity: +12.5%" in index.text
    document, console, _ = visit(tmp_path, probed(index.source, CARD))
    assert console == []
    none, best = noted(document, "texts")
    assert none == [
        "none",
        "No target of the grid is that good: perplexity rises by 12.5% or more.",
        "less than +12.5%",
    ]
    assert (best[0], best[2]) == ("2.500\xa0\xd7", "+50.0%")  # 5 / (4 / 4 + 1) at 64, 5 / (4 / 2 + 1) / 2 at 128
    assert "Target 64 cycles, draft 16 cycles (1/4 as long), gamma 4" in best[1]


def test_a_card_starts_at_the_loss_that_is_accepted(tmp_path):
    cells = (fake_keys(stoc_len=64, draft_stoc_len=16), 1, 3), (fake_keys(draft_stoc_len=64), 1, 2.02)
    index = report_of(tmp_path, write_measured(tmp_path, *cells)).index
    assert "Accepted rise of the target's perplexity: +5%" in index.text
    assert "what the nearest allows" not in index.text
    shown = "1.667 \xd7 Over plain SC decoding at the shortest acceptable length, 128 cycles; 1.667"
    assert shown in index.text  # 5 / (4 / 2 + 1)
