"""The app behind a proxy with a path, as JupyterHub's, code-server's and nginx's: one keeps it, one does not."""

from __future__ import annotations

import http.client
import json
import logging
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from werkzeug.serving import make_server

from dashboards.app.__main__ import address_of, main
from dashboards.app.folder import Folder
from dashboards.app.frame import PAGES, make_app
from dashboards.app.prefix import prefix_of, without_prefix
from tests.dashboards.browser import BROWSER, FLAGS, IN_A_BROWSER
from tests.dashboards.made_folder import a_folder

PREFIX = "/user/ann%40lab/proxy/8050/"
VARIABLES = ("DASH_REQUESTS_PATHNAME_PREFIX", "DASH_URL_BASE_PATHNAME", "DASH_ROUTES_PATHNAME_PREFIX")
PROBE = """<script>
const until = async (holds) => { while (!holds()) await new Promise((done) => setTimeout(done, 40)); };
(async () => {
  const here = () => document.querySelector("nav a.here")?.id;
  await until(() => here() === "to-search" && document.querySelector("#chosen h3"));
  document.getElementById("to-ring").click();
  await until(() => here() === "to-ring" && document.querySelector("#top .figure .main-svg"));
  const links = [...document.querySelectorAll("nav a")].map((link) => link.getAttribute("href"));
  const seen = { path: location.pathname, links: links };
  await fetch("PREFIXseen", { method: "POST", body: JSON.stringify(seen) });
})();
</script>"""


class Proxy(BaseHTTPRequestHandler):
    """Serves what is under PREFIX, and nothing else; ``keeps`` the path or takes the prefix away."""

    app_port, keeps, seen = 0, True, threading.Event()
    answer: ClassVar[dict] = {}

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.startswith(PREFIX):
            self.send_error(404)
            return
        if self.path == f"{PREFIX}seen":
            type(self).answer = json.loads(body)
            self.send_response(200)
            self.end_headers()
            self.seen.set()
            return
        app = http.client.HTTPConnection("127.0.0.1", self.app_port)
        path = self.path if self.keeps else "/" + self.path.removeprefix(PREFIX)
        app.request(self.command, path, body, {"Content-Type": self.headers.get("Content-Type", "text/plain")})
        response = app.getresponse()
        content = response.read()
        self.send_response(response.status)
        for name in ("Content-Type", "Content-Security-Policy", "Location"):
            if value := response.headers[name]:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        app.close()

    do_GET = do_POST = _pass_on

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    a_folder(path)
    return path


@pytest.fixture(params=[True, False], ids=["keeps the path", "takes the prefix away"])
def proxy(request: pytest.FixtureRequest, folder: Path) -> Iterator[type[Proxy]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = make_app(Folder(str(folder)), prefix=PREFIX)
    app.index_string = app.index_string.replace("</body>", f"{PROBE.replace('PREFIX', PREFIX)}</body>")
    inner = make_server("127.0.0.1", 0, app.server, threaded=True)
    kind = type("Kind", (Proxy,), {"app_port": inner.port, "keeps": request.param, "seen": threading.Event()})
    outer = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.port = outer.server_port
    for server in (inner, outer):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind
    for server in (outer, inner):
        server.shutdown()
        server.server_close()


def got(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    response = connection.getresponse()
    content = response.read().decode("utf-8", "replace")
    connection.close()
    return response.status, content


def prefix_in(index: str) -> str:
    """What Dash's program in the browser puts before all that it asks for."""
    found = re.search(r'<script id="_dash-config"[^>]*>(.*?)</script>', index)
    assert found
    return json.loads(found[1])["requests_pathname_prefix"]


def test_all_that_a_page_asks_for_comes_through_the_proxy(proxy: type[Proxy]) -> None:
    for page in ("", "ring", "search?pattern=bigbird"):
        status, index = got(proxy.port, f"{PREFIX}{page}")
        assert status == 200
        assert prefix_in(index) == PREFIX
        wanted = re.findall(r'(?:src|href)="([^"]+)"', index)
        assert wanted
        for address in [*wanted, f"{PREFIX}_dash-layout", f"{PREFIX}_dash-dependencies"]:
            assert got(proxy.port, address.replace("&amp;", "&"))[0] == 200, address


@pytest.mark.browser
@IN_A_BROWSER[1]
def test_links_and_callbacks_work_through_the_proxy(proxy: type[Proxy], tmp_path: Path) -> None:
    flags = [*FLAGS.split(), "--window-size=1200,900", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *flags, "--remote-debugging-port=0", f"http://127.0.0.1:{proxy.port}{PREFIX}"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as browser:
        try:
            assert proxy.seen.wait(60), (tmp_path / "log").read_text()[-3000:]
        finally:
            browser.terminate()
    assert proxy.answer == {"path": f"{PREFIX}ring", "links": [f"{PREFIX}{name}" for name in PAGES]}
    assert "CONSOLE" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("names", [*((name,) for name in VARIABLES), VARIABLES])
def test_dash_s_own_variables_say_the_prefix_too(
    names: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        monkeypatch.setenv(name, PREFIX)
    client = make_app(Folder(str(folder))).server.test_client()
    for path in ("/", "/ring", PREFIX, f"{PREFIX}ring", PREFIX.removesuffix("/")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert prefix_in(answer.text) == PREFIX
    assert make_app(Folder(str(folder)), prefix="/other").config.requests_pathname_prefix == "/other/"


def test_a_prefix_is_written_as_one_likes() -> None:
    for text in ("a/b", "/a/b", "a/b/", "//a/b//"):
        assert prefix_of(text) == "/a/b/"
    assert prefix_of("/") == "/"
    for path, wanted in (("/a/b", "/"), ("/a/b/", "/"), ("/a/b/c", "/c"), ("/a/bc", "/a/bc"), ("/c", "/c"), ("", "/")):
        assert without_prefix(path, "/a/b/") == wanted
        assert without_prefix(path, "/") == (path or "/")


@pytest.mark.parametrize("text", ["http://host/a", "/a b/", "/a/../b", "<script>", '"', "/a?b=c", "/a#b", "/é/"])
def test_what_is_no_prefix_ends_the_app_in_one_line(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dash.Dash.run", lambda *_, **__: pytest.fail("it began to serve"))
    assert main([str(folder), "--prefix", text]) == 2
    told = f"error: a prefix is the path of a URL, as /user/ann/proxy/8050/, got {text!r}"
    assert capsys.readouterr().err.splitlines() == [told]


def test_the_address_that_is_told_is_one_that_a_browser_opens() -> None:
    assert address_of("127.0.0.1", 8050, "/") == "http://127.0.0.1:8050"
    assert address_of("::1", 8050, "/a/") == "http://[::1]:8050/a/"
