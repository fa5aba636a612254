"""The page in a real browser, cut off from the network: what it draws, what it shows on hover, what it complains of."""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from html import unescape
from pathlib import Path

import pytest

from dashboards.report import write_report
from raybsa.results.record import SeriesPoint
from raybsa.results.store import Store
from tests.dashboards.browser import BROWSER, FLAGS, IN_A_BROWSER
from tests.dashboards.made import a_benchmark, a_search
from tests.dashboards.made_peers import a_gpu_suite

pytestmark = IN_A_BROWSER
OPTIONS = FLAGS + "--proxy-server=127.0.0.1:9 --window-size=1400,1000 --virtual-time-budget=8000 --dump-dom"
# Moves the pointer onto the first dominated point, clicks it, presses Copy, and writes down what the page shows.
PROBE = """<script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const inked = (canvas) => {
  const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(pixels).size;
};
(async () => {
  while (!document.body.dataset.drawn) await wait(50);
  const point = document.querySelector("[data-panel] path.point");
  point.scrollIntoView({ block: "center" });
  const box = point.getBoundingClientRect();
  const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true };
  const drag = document.querySelector("[data-panel] .nsewdrag");
  drag.dispatchEvent(new MouseEvent("mousemove", at));
  await wait(300);
  const tip = document.getElementById("tip");
  const result = { shown: !tip.hidden, text: tip.textContent, inks: [...tip.querySelectorAll("canvas")].map(inked) };
  const panel = document.querySelector(".panel.trial");
  result.first = panel.dataset.trial;
  drag.dispatchEvent(new MouseEvent("mousedown", at));
  document.dispatchEvent(new MouseEvent("mouseup", at));
  await wait(600);
  result.clicked = panel.dataset.trial;
  result.paste = panel.querySelector("pre").textContent;
  panel.querySelector("button").click();
  for (let tries = 0; tries < 40 && panel.querySelector("button").textContent === "Copy"; tries++) await wait(50);
  result.copy = panel.querySelector("button").textContent;
  result.plots = document.querySelectorAll("[data-figure] .main-svg").length;
  result.marks = document.querySelectorAll("[data-panel] .points path.point").length;
  result.hacked = document.body.dataset.hacked ?? "no";
  result.overflow = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.probe = JSON.stringify(result);
})();
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search, a benchmark and part of the gpu suite, drawn, with the probe at the end of the page."""
    folder = tmp_path_factory.mktemp("report")
    store = Store.create(folder / "results")
    records, series = a_search()
    kernels = [record for record in a_gpu_suite() if record.seq_len == 8192 and record.block_size == 64]
    for record in records + a_benchmark() + kernels:
        store.write_record(record)
    by_trial: dict[str, list[SeriesPoint]] = defaultdict(list)
    for point in series:
        by_trial[point.trial_id].append(point)
    for points in by_trial.values():
        store.write_series(points)
    path = Path(write_report(str(folder / "results"), str(folder / "report.html")))
    html = path.read_text("utf-8")
    path.write_text(html.replace("</body>", PROBE + "</body>"), "utf-8")
    return path


def opened(page: Path, profile: Path, *extra: str) -> tuple[dict, str, str]:
    """What the probe wrote, the rendered document and the browser's log."""
    command = [str(BROWSER), *OPTIONS.split(), f"--user-data-dir={profile}", *extra, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert probe, f"the page did not finish drawing:\n{done.stderr[-2000:]}"
    return json.loads(unescape(probe[1])), done.stdout, done.stderr


def test_the_page_draws_everything_and_shows_the_trial_under_the_pointer(page: Path, tmp_path: Path) -> None:
    seen, document, log = opened(page, tmp_path)
    figures = len(re.findall(r'data-figure="', document))
    assert figures >= 10
    assert f'data-drawn="{figures}"' in document
    assert seen["plots"] >= figures
    assert seen["marks"] == len(a_search()[0]) - 2
    assert seen["shown"]
    assert "bits per byte" in seen["text"]
    assert seen["inks"]
    assert min(seen["inks"]) >= 2
    assert seen["clicked"] != seen["first"]
    assert seen["clicked"] in seen["text"]
    assert seen["paste"].startswith("create_block_sparse_attention(**{")
    assert seen["copy"] in ("copied", "selected: press Ctrl+C")
    assert seen["hacked"] == "no"
    assert "CONSOLE" not in log, log


def test_the_page_fits_a_narrow_window(page: Path, tmp_path: Path) -> None:
    seen, _, _ = opened(page, tmp_path, "--window-size=800,1000")
    assert seen["overflow"] <= 0
