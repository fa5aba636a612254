"""How soon does the app show a folder of many trials?

python -m tests.dashboards.first_view FOLDER --trials 10000

Trials are made up and written into FOLDER where it is empty, a file each, as a search would. Chromium opens the app
twice: over these files, and once they are compacted. Seconds are a reader's, whose browser is open and never saw the
app: from the address being entered until the front is drawn, and until no file is left to be read.
"""

from __future__ import annotations

import argparse
import logging
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue

from flask import request
from werkzeug.serving import make_server

from dashboards.app.folder import Folder
from dashboards.app.frame import make_app
from raybsa.results.store import Store
from tests.dashboards.browser import BROWSER, FLAGS
from tests.dashboards.made import DENSE, FAMILIES, curve, lm_record, sparse

OPTIONS = FLAGS + "--window-size=1400,1000 --remote-debugging-port=0"
PROBE = """<script>
const until = async (holds) => { while (!holds()) await new Promise((done) => setTimeout(done, 20)); };
(async () => {
  await until(() => document.querySelector("#top .points path.point") && document.querySelector("#chosen h3"));
  const first = performance.now();
  await until(() => document.querySelector("#notes") && !document.querySelector("#notes p"));
  const whole = performance.now();
  await fetch("/seen", { method: "POST", body: JSON.stringify({ first, whole }) });
})();
</script>"""


def fill(store: Store, trials: int) -> None:
    """A dense baseline, and sparse trials at random places beyond a front."""
    draw = random.Random(0)
    store.write_record(lm_record("dense", DENSE, 2.21, 40.0))
    for number in range(trials - 1):
        family, density = draw.choice(FAMILIES)[0], round(draw.uniform(0.02, 0.5), 3)
        quality = 2.2 + 0.1 * (0.5 - density) ** 2 + abs(draw.gauss(0, 0.05))
        name = f"trial-{number:05d}"
        store.write_series(curve(name, "train_loss", quality))
        store.write_record(lm_record(name, sparse(family, density), quality, 4 + 60 * density + draw.expovariate(0.3)))


@contextmanager
def served(folder: str) -> Iterator[tuple[str, Queue]]:
    """The app's address, and what the page in the browser tells."""
    app = make_app(Folder(folder), warm=True)
    app.index_string = app.index_string.replace("</body>", PROBE + "</body>")
    told: Queue = Queue()

    @app.server.get("/open")
    def opened() -> str:
        return "<script>setTimeout(() => location.replace('/'), 3000)</script>"

    @app.server.post("/seen")
    def seen() -> str:
        told.put(request.get_json(force=True))
        return "thanks"

    server = make_server("127.0.0.1", 0, app.server, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}/open", told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def look(folder: str) -> str:
    """Starts the app, opens it in a browser, and says what was seen."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as profile, served(folder) as (address, told):
        started = time.perf_counter() - begun
        command = [str(BROWSER), *OPTIONS.split(), f"--user-data-dir={profile}", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            seen = told.get(timeout=120)
        finally:
            browser.terminate()
            browser.wait(20)
    first, whole = seen["first"] / 1000, seen["whole"] / 1000
    return f"the app starts in {started:.2f} s; front after {first:.2f} s, all rows after {whole:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--trials", type=int, default=10_000)
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store.create(arguments.folder)
    if not store.files("records"):
        fill(store, arguments.trials)
    print(f"{len(store.files('records'))} files: {look(arguments.folder)}", flush=True)
    store.compact()
    print(f"{len(store.files('records'))} files: {look(arguments.folder)}", flush=True)


if __name__ == "__main__":
    main()
