"""The app in a real browser: every page is clicked, a point, a filter, a new row; a console error fails."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from flask import request
from werkzeug.serving import make_server

from dashboards.app.folder import Folder
from dashboards.app.frame import PAGES, make_app
from dashboards.theme import PALETTE
from tests.dashboards.browser import BROWSER, FLAGS, IN_A_BROWSER
from tests.dashboards.made import lm_record, sparse
from tests.dashboards.made_folder import a_folder

pytestmark = IN_A_BROWSER
VIEWS = [[800, "light"], [1400, "dark"]]  # a frame each: no layout depends on colours
OPTIONS = FLAGS + "--window-size=800,1000 --remote-debugging-port=0"
# Walks through the pages as a reader would, and sends what it saw.
PROBE = """<script>
const until = async (holds) => { while (!holds()) await new Promise((done) => setTimeout(done, 40)); };
const all = (what, where = document) => [...where.querySelectorAll(what)];
const drawn = (where = document) => all(".figure", where).every((figure) => figure.querySelector(".main-svg"));
const marks = () => all("#top .points path.point").length;
const told = () => document.querySelector("#chosen h3")?.textContent;
const page = async (name, where = document) => {
  await until(() => where.getElementById("to-" + name));
  where.getElementById("to-" + name).click();
  await until(() => where.querySelector("nav a.here")?.id === "to-" + name && drawn(where));
};
const framed = async (width, scheme) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:1000px;border:0;color-scheme:${scheme}`;
  frame.src = "/";
  document.body.append(frame);
  await until(() => frame.contentDocument.querySelector("#chosen h3") && drawn(frame.contentDocument));
  const pages = {}, where = frame.contentDocument;
  for (const name of PAGE_NAMES) {
    await page(name, where);
    const shown = { figures: all(".figure", where).length };
    shown.overflow = where.documentElement.scrollWidth - frame.contentWindow.innerWidth;
    shown.paper = getComputedStyle(where.body).backgroundColor;
    shown.ink = getComputedStyle(where.querySelector(".main-svg .xtick text, .main-svg .ytick text")).fill;
    pages[name] = shown;
  }
  frame.remove();
  return pages;
};
const go = (search) => { history.pushState({}, "", search); dispatchEvent(new PopStateEvent("popstate")); };
(async () => {
  if (window !== top) return;
  const seen = { pages: {} };
  await until(() => told() && marks() && drawn());
  for (const [width, scheme] of VIEWS) seen.pages[scheme] = await framed(width, scheme);
  await page("search");
  await until(() => told() && marks());
  seen.first = told();
  seen.marks = marks();
  const point = document.querySelector("#top .points path.point");
  point.scrollIntoView({ block: "center" });
  const box = point.getBoundingClientRect();
  const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true };
  const drag = document.querySelector("#top .nsewdrag");
  for (const [kind, who] of [["mousemove", drag], ["mousedown", drag], ["mouseup", document]]) {
    await new Promise((done) => setTimeout(done, 300));
    who.dispatchEvent(new MouseEvent(kind, at));
  }
  await until(() => told() !== seen.first && drawn());
  seen.clicked = told();
  seen.address = location.search;
  seen.spec = document.querySelector("#chosen pre").textContent;
  seen.details = all("#detail .figure").length;
  await fetch("/write");
  await until(() => marks() === seen.marks + 1);
  go("?pattern=bigbird");
  await until(() => marks() && marks() < 10 && drawn());
  seen.filtered = marks();
  go("?pattern=bigbird&pattern=nosuch");
  await until(() => all("#controls .many").some((label) => label.textContent.includes("nosuch")));
  go("?run=zzz");
  await until(() => document.querySelector("#top")?.textContent.includes("The filters leave nothing"));
  await new Promise((done) => setTimeout(done, 300));
  seen.kept = location.search;
  seen.hacked = document.body.dataset.hacked ?? "no";
  await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
})();
</script>"""


def rgb(shade: str) -> str:
    """``rgb(1, 2, 3)`` of ``#010203``, as a browser tells it."""
    return f"rgb({', '.join(str(int(shade[i : i + 2], 16)) for i in (1, 3, 5))})"


class Served:
    """An app over a folder, its address, and what the probe sent."""

    def __init__(self, folder: Path) -> None:
        store = a_folder(folder)
        app = make_app(Folder(str(folder)))
        probe = PROBE.replace("PAGE_NAMES", str(list(PAGES))).replace("VIEWS", str(VIEWS))
        app.index_string = app.index_string.replace("</body>", f"{probe}</body>")
        self.seen: dict[str, Any] = {}
        self.reached, self.done = threading.Event(), threading.Event()
        app.server.before_request(self.reached.set)

        @app.server.get("/write")
        def write() -> str:
            store.write_record(lm_record("brand-new", sparse("strided", 0.2), 2.3, 12.0))
            return "written"

        @app.server.post("/seen")
        def seen() -> str:
            self.seen = request.get_json(force=True)
            self.done.set()
            return "thanks"

        self._server = make_server("127.0.0.1", 0, app.server, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = Served(tmp_path / "results")
    yield made
    made.close()


def opened(address: str, profile: Path, log: IO[str]) -> subprocess.Popen[bytes]:
    command = [str(BROWSER), *OPTIONS.split(), f"--user-data-dir={profile}", address]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def ended(browser: subprocess.Popen[bytes]) -> None:
    browser.terminate()
    browser.wait(20)


def test_every_page_is_drawn_and_what_is_clicked_is_shown(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        browser = opened(served.address, tmp_path / "profile", file)
        if not served.reached.wait(15):  # on a busy machine some Chromium comes up and never asks for its page
            ended(browser)
            browser = opened(served.address, tmp_path / "another profile", file)
        finished = served.done.wait(60)
        ended(browser)
    assert finished, f"the walk did not come to its end:\n{log.read_text()[-3000:]}"
    seen = served.seen
    for dark, (width, scheme) in enumerate(VIEWS):
        assert list(seen["pages"][scheme]) == list(PAGES)
        for name, page in seen["pages"][scheme].items():
            assert page["figures"] >= 1, f"{name} draws nothing"
            assert page["overflow"] <= 0, f"{name} is {page['overflow']} pixels too wide at {width}"
            for meaning in ("paper", "ink"):
                assert page[meaning] == rgb(PALETTE[meaning][dark]), f"{name}: {meaning}, {scheme}"
    assert seen["clicked"] != seen["first"]
    assert "trial=" in seen["address"]
    assert seen["spec"].startswith("create_block_sparse_attention(**{")
    assert seen["details"] >= 3
    assert 1 <= seen["filtered"] < seen["marks"]
    assert seen["kept"] == "?run=zzz"
    assert seen["hacked"] == "no"
    assert "CONSOLE" not in log.read_text(), log.read_text()
