"""What a report of a large synthetic grid costs: python benchmarks/report.py [--cells 1000]

Builds the Parquet files of a grid of about that many cells (48 prompts each), then times the report in one process,
measures its folder, and how long headless Chromium takes until the first and the last chart of the index and of a pair
is drawn.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from fake_cells import CONTROL_ALPHAS, fake_keys  # noqa: E402
from report_pages import write_measured  # noqa: E402

PAIRS, STOC_LENS, RATIOS, GAMMAS, PRECS = 4, (32, 64, 96, 128, 192, 256), (1, 0.75, 0.5), (1, 2, 4, 6, 8), (6, 7, 8)
TIMED = """
const look = () => {
  const drawn = [...document.querySelectorAll(".chart")].map(box => Boolean(box.querySelector("svg")));
  const now = performance.now();
  if (drawn[0] ?? true) look.first ??= now;
  if (drawn.every(Boolean)) console.info(`drawn after ${look.first} ${now} ms`); else setTimeout(look, 20);
};
look();
"""


def cells(count: int) -> list[tuple]:
    """Return (keys, true alpha, perplexity of the target) of up to `count` cells: grids and controls of some pairs."""
    found = []
    for pair in range(PAIRS):
        found += [(fake_keys(f"pair-{pair}", arm, 128), alpha, 2.3) for arm, alpha in CONTROL_ALPHAS.items()]
        for stoc_len, ratio, gamma, sc_prec in product(STOC_LENS, RATIOS, GAMMAS, PRECS):
            axes = {"stoc_len": stoc_len, "draft_stoc_len": int(ratio * stoc_len), "gamma": gamma, "sc_prec": sc_prec}
            alpha = 0.9 * ratio**0.5 * (1 - 2 / stoc_len**0.5)
            found.append((fake_keys(f"pair-{pair}", **axes), alpha, 2 + 8 / stoc_len))
    return found[:count]


def opened_ms(path: Path, folder: Path) -> tuple[float, float]:
    """Return the milliseconds from navigation until the first chart of a page, and every one, is drawn, in headless
    Chromium; `folder` is for what it needs."""
    source = path.read_text(encoding="utf-8")
    (nonce,) = set(re.findall(r'nonce="(\w+)"', source)) or {""}
    page = folder / "opened.html"
    before, _, after = source.rpartition("</body>")  # Vega has one in a string
    page.write_text(f'{before}<script nonce="{nonce}">{TIMED}</script></body>{after}', encoding="utf-8")
    # A debugging port keeps the browser, and its clock that of the wall, until it is ended.
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--remote-debugging-port=0"]
    command = ["chromium", *flags, f"--user-data-dir={folder / 'profile'}", f"file://{page}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        found = next(filter(None, (re.search(r"drawn after ([\d.]+) ([\d.]+) ms", line) for line in browser.stderr)))
        browser.terminate()
    page.unlink()
    return float(found[1]), float(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), arguments.cells)


def report(folder: Path, count: int) -> None:
    """Write the cells, then time, measure and open their report."""
    plan = write_measured(folder / "data", *cells(count), prompts=48, max_new_tokens=64)
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "scspec", "report", "--plan", "plan.json", "--output", "reports/index.html"]
    began_s = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    built_s = time.perf_counter() - began_s
    files = [path for path in (folder / "reports").rglob("*") if path.is_file()]
    pages = [path.stat().st_size for path in (folder / "reports/cells").rglob("*.html")]
    print(f"{len(plan['cells'])} cells: {built_s:.1f} s, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    print(f"a cell's page: {sum(pages) / len(pages) / 1e3:.1f} kB; a pair's: ", end="")
    print(", ".join(f"{path.stat().st_size / 1e6:.2f} MB" for path in sorted((folder / "reports/pairs").iterdir())))
    for path in (folder / "reports/index.html", folder / "reports/pairs/pair-0.html"):
        first, every = opened_ms(path, folder)
        print(f"{path.name}: first chart after {first:.0f} ms, every chart after {every:.0f} ms")


if __name__ == "__main__":
    main()
