"""The report in headless Chromium: it asks for nothing, complains of nothing, and every chart is drawn.

Skipped where there is no Chromium, except in CI (CI=true), where that is a failure.
"""

import json
import os
import re
import shutil
import subprocess

import pytest
from fake_cells import write_fake_grid

from scspec.charts import THEMES
from scspec.report import build_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", *QUIET.split()]
SCHEMES = {"dark": 0, "light": 1}  # blink's preferredColorScheme


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a grid, as a string."""
    if CHROMIUM is None:
        assert os.environ.get("CI") != "true", f"none of {NAMES} is on the PATH"
        pytest.skip(f"none of {NAMES} is on the PATH")
    folder = tmp_path_factory.mktemp("report")
    plan = write_fake_grid(folder, prompts=8, max_new_tokens=12)
    build_report([cell["path"] for cell in plan["cells"]], plan, folder / "index.html")
    return (folder / "index.html").read_text(encoding="utf-8")


def visit(folder, page, scheme="light", width_px=1280):
    """(document after its scripts ran, console lines, addresses the page asked for)."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    log = folder / "net.json"
    command = [
        *(CHROMIUM, *FLAGS, "--enable-logging=stderr", "--v=0"),
        *(f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"),
        *(f"--window-size={width_px},900", "--dump-dom", f"file://{folder / 'page.html'}"),
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


def charts_of(document):
    """id -> the drawn content of each chart."""
    return dict(re.findall(r'<div id="([\w-]+)" class="chart[^>]*>(.*?)<figcaption>', document, re.DOTALL))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_chart_is_drawn_in_the_colours_of_the_page(tmp_path, page, scheme):
    document, console, requests = visit(tmp_path, page, scheme)
    assert (console, requests) == ([], [])
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', page).group(1))
    drawn = charts_of(document)
    assert list(drawn) == list(specs)
    for name, svg in drawn.items():
        (rows,) = specs[name]["datasets"].values()
        each = 2 if name.startswith("speedup") else 1  # both row models
        assert len(re.findall(r'aria-roledescription="(?:point|circle)"', svg)) == each * len(rows), name
        assert THEMES[scheme]["axis"]["titleColor"] in svg


MEASURE = """setTimeout(() => {
  const box = element => [element.scrollWidth, element.clientWidth];
  const sizes = [box(document.documentElement), ...Array.from(document.querySelectorAll(".chart"), box)];
  document.documentElement.setAttribute("data-sizes", JSON.stringify(sizes));
}, 5000);"""


@pytest.mark.parametrize(("width_px", "scrolls"), [(1280, False), (800, False), (500, True)])
def test_charts_take_the_width_there_is_and_scroll_within_themselves(tmp_path, page, width_px, scrolls):
    (nonce,) = set(re.findall(r'nonce="(\w+)"', page))
    measured = page.replace("</main>", f'</main><script nonce="{nonce}">{MEASURE}</script>')
    document, console, _ = visit(tmp_path, measured, width_px=width_px)
    assert console == []
    whole, *charts = json.loads(re.search(r'data-sizes="(.*?)"', document).group(1))
    assert whole[0] == whole[1]
    for (name, svg), (content, box) in zip(charts_of(document).items(), charts, strict=True):
        assert box == whole[1] - 40
        two_panels = not name.startswith("controls")
        assert (content > box) == (scrolls and two_panels)
        width = float(re.search(r'<svg[^>]* width="([\d.]+)"', svg).group(1))
        assert width > 0.9 * box


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
