"""The app's frame: what surrounds every page, and the callbacks that move it.

The address says what is shown. Controls and clicks write it, the folder's version and the reader's colours join it, and
the page follows from the three: nothing else is remembered.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.development.base_component import Component
from flask import Response

from dashboards.app.address import Address, parse
from dashboards.app.components import components
from dashboards.app.filters import Option, options
from dashboards.app.folder import Folder
from dashboards.app.pages import benchmark, compare, compression, forecast, memory, recovery, ring, search
from dashboards.app.prefix import Unprefixed, dash_reads_none, prefix_of, without_prefix
from dashboards.app.view import Control, Shown, View, view_of
from dashboards.markup import Markup, element, join
from dashboards.page import STYLE, Page
from dashboards.sections.frame import note, section
from dashboards.theme import css_variables

PAGES: dict[str, ModuleType] = {
    "search": search,
    "benchmark": benchmark,
    "memory": memory,
    "ring": ring,
    "compression": compression,
    "recovery": recovery,
    "forecast": forecast,
    "compare": compare,
}
LOOK_MS = 2000  # between two looks at the folder
_KEPT = 8  # drawings
_UNSEEN = "\u200b"
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)
_APP_STYLE = STYLE.with_name("app.css")
_DARK = """function(_, before) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  return dark === before ? window.dash_clientside.no_update : dark;
}"""


def make_app(folder: Folder, *, own_patterns: bool = False, warm: bool = False, prefix: str | None = None) -> Dash:
    """The app over one folder.

    Args:
        own_patterns: imports code that rows name; see ``dashboards.report``.
        warm: draws the first view at once.
        prefix: what the path of every address begins with behind a proxy, ``/user/ann/proxy/8050/``; None takes that of
            Dash's environment variables. The app also answers without it, for proxies that take it away.

    Raises:
        ValueError: the prefix is no path of a URL.
    """
    prefix = prefix_of(prefix)
    with dash_reads_none():
        app = Dash(
            "dashboards",
            title="raybsa",
            update_title="",
            suppress_callback_exceptions=True,
            assets_folder="no assets",
            eager_loading=True,
            routes_pathname_prefix="/",
            requests_pathname_prefix=prefix,
        )
    app.server.wsgi_app = Unprefixed(app.server.wsgi_app, prefix)
    app.index_string = app.index_string.replace("{%css%}", f"<style>{_style()}</style>{{%css%}}")
    app.layout = _layout(folder)
    app.server.after_request(_guarded)
    drawings = Drawings(folder, own_patterns, prefix)
    if warm:
        drawings.warm_up()
    _connect(app, folder, drawings, prefix)
    return app


class Drawings:
    """What was drawn lately of a folder: the first view, which is there when a reader comes, and pages gone back to."""

    def __init__(self, folder: Folder, own_patterns: bool, prefix: str = "/") -> None:
        self._folder, self._own_patterns, self._prefix = folder, own_patterns, prefix
        self._drawing = threading.Lock()  # Plotly looks for half-imported modules when two threads draw their first
        self.page, self.chosen = lru_cache(_KEPT)(self._page), lru_cache(_KEPT)(self._chosen)

    def warm_up(self) -> None:
        """Reads the folder and draws its first view, for light and for dark."""
        version = self._folder.refresh()
        for dark in (False, True):
            self.page("search", "", version, dark)
            self.chosen("search", "", version, dark)

    def _page(self, name: str, query: str, version: int, dark: bool) -> tuple[list, list, list, list]:
        """The navigation, controls, top and rest of a page, of the folder's rows as of ``version``."""
        address = _address(f"/{name}", query)
        results = self._folder.results
        with self._drawing:
            view = self._view(address)
            shown = PAGES[address.page].show(view) if address.page in PAGES else _no_page(address.page)
            top = join(*map(note, _not_offered(address, shown.controls)), shown.top)
            parts = [_made(part, view, dark) for part in (top, shown.rest)]
        return _nav(address, self._prefix), _controls(address, options(results, address), shown), parts[0], parts[1]

    def _chosen(self, name: str, query: str, version: int, dark: bool) -> tuple[list, list]:
        """The card and the figures of the trial that the address names, where its page shows one."""
        address = _address(f"/{name}", query)
        with self._drawing:
            view = self._view(address)
            parts = search.chosen(view) if address.page == "search" else None
            return (_made(parts[0], view, dark), _made(parts[1], view, dark)) if parts else ([], [])

    def _view(self, address: Address) -> View:
        return view_of(Page(self._own_patterns), self._folder.results, self._folder.root, address)


def _style() -> str:
    light, dark = css_variables(dark=False), css_variables(dark=True)
    variables = f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return variables + STYLE.read_text("utf-8") + _APP_STYLE.read_text("utf-8")


def _guarded(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _layout(folder: Folder) -> Component:
    places = [html.Div(id=name, className=kind) for name, kind in (("top", ""), ("chosen", "panel trial"))]
    return html.Div(
        [
            dcc.Location(id="address", refresh="callback-nav"),
            dcc.Interval(id="look", interval=LOOK_MS),
            *(dcc.Store(id=name) for name in ("version", "dark", "drawn")),
            html.Header([html.H1("raybsa"), html.Code(folder.root)]),
            html.Nav(id="nav"),
            html.Div(id="controls", className="controls"),
            html.Div(id="notes"),
            html.Main([html.Div(places, className="beside"), html.Div(id="detail"), html.Div(id="rest")]),
        ]
    )


def _connect(app: Dash, folder: Folder, drawings: Drawings, prefix: str) -> None:
    app.clientside_callback(_DARK, Output("dark", "data"), Input("look", "n_intervals"), State("dark", "data"))
    where = (Input("address", "pathname"), Input("address", "search"), Input("version", "data"), Input("dark", "data"))

    @app.callback(
        Output("version", "data"), Output("notes", "children"), Input("look", "n_intervals"), State("version", "data")
    )
    def look(_: int, before: int | None) -> Any:
        version = folder.look(before)
        return no_update if version == before else (version, [html.P(text, className="note") for text in folder.notes])

    @app.callback(
        *(Output(name, "children") for name in ("nav", "controls", "top", "rest")),
        Output("drawn", "data"),
        *where,
        State("drawn", "data"),
    )
    def draw(pathname: str, query: str, version: int | None, dark: bool | None, drawn: list | None) -> Any:
        address = _address(pathname, query, prefix)
        now = [address.page, address.without("trial").search, version, dark]
        if now == drawn or version is None or dark is None:
            return no_update
        return *drawings.page(address.page, address.search, version, dark), now

    @app.callback(Output("chosen", "children"), Output("detail", "children"), *where)
    def choose(pathname: str, query: str, version: int | None, dark: bool | None) -> Any:
        address = _address(pathname, query, prefix)
        if version is None or dark is None:
            return no_update
        return drawings.chosen(address.page, address.search, version, dark)

    @app.callback(
        Output("address", "search"),
        Input({"type": "choice", "name": ALL}, "value"),
        Input({"type": "front", "name": ALL}, "clickData"),
        State("address", "pathname"),
        State("address", "search"),
        prevent_initial_call=True,
    )
    def walk(values: list, clicks: list, pathname: str, query: str) -> Any:
        before = _address(pathname, query, prefix)
        after = _walked(before, ctx.triggered_id, ctx.triggered[0]["value"])
        return no_update if after == before else after.search


def _address(pathname: str, query: str, prefix: str = "/") -> Address:
    """The address of a URL: the first page where it names none; runs that are compared are not filtered by run."""
    address = parse(without_prefix(unquote(pathname or ""), unquote(prefix)), query)
    if not address.page:
        return Address(next(iter(PAGES)), address.chosen)
    return address.without("run") if address.page == "compare" else address


def _walked(address: Address, who: Any, value: Any) -> Address:
    """The address after a control took a value or a point was clicked."""
    if not who or value is None:
        return address
    if who["type"] == "front":
        return address.with_choice("trial", [str(value["points"][0]["customdata"])])
    values = [_meant(one) for one in ([value] if isinstance(value, str) else value)]
    after = address.with_choice(who["name"], values)
    return after.without("trial") if who["name"] == "question" and after != address else after


def _made(part: Markup | None, view: View, dark: bool) -> list[Component | str]:
    return [] if part is None else components(part, view.page, dark=dark)


def _no_page(name: str) -> Shown:
    told = f"There is no page {name!r}; these are: {', '.join(PAGES)}."
    return Shown(section("no-page", "No such page", element("p", told)))


def _not_offered(address: Address, controls: tuple[Control, ...]) -> list[str]:
    """What the address asks of the controls and they do not have, each in a sentence."""
    asked = ((control, address.one(control.name)) for control in controls)
    return [
        f"{control.label}: there is no {value!r} here; what is shown is {control.label_of_value}."
        for control, value in asked
        if value is not None and value not in [option.value for option in control.options]
    ]


def _nav(address: Address, prefix: str) -> list[Component]:
    """The filters go along to every page."""
    kept = address.filters.search
    return [
        dcc.Link(
            page.TITLE, href=f"{prefix}{name}{kept}", className="here" if name == address.page else "", id=f"to-{name}"
        )
        for name, page in PAGES.items()
    ]


def _controls(address: Address, found: dict[str, list[Option]], shown: Shown) -> list[Component]:
    filters = [
        _filter(name, offered, address.chosen.get(name, ()))
        for name, offered in found.items()
        if (len(offered) > 1 or name in address.chosen) and (name, address.page) != ("run", "compare")
    ]
    return [*(_choice(control) for control in shown.controls if len(control.options) > 1), *filters]


def _filter(name: str, offered: list[Option], chosen: tuple[str, ...]) -> Component:
    known = [option for option in offered if option.value in chosen or len(offered) <= 500][:500]
    return _dropdown(name, name, known, list(chosen), multi=True)


def _choice(control: Control) -> Component:
    return _dropdown(control.name, control.label, control.options, control.value, multi=False)


def _offer(option: Option) -> dict[str, str]:
    """What a dropdown shows; a value that is longer than its label is there on demand."""
    offer = {"value": _sent(option.value), "label": option.label}
    return offer | {"title": option.value} if len(option.value) > len(option.label) else offer


def _sent(value: str) -> str:
    """A value as the browser gets it: no object of JavaScript can have a name ``__proto__``, and Dash's dropdown throws
    over it."""
    return f"{_UNSEEN}{value}" if value.lstrip(_UNSEEN) == "__proto__" else value


def _meant(value: str) -> str:
    """What ``_sent`` was given."""
    return value[1:] if value.startswith(_UNSEEN) and _sent(value) != value else value


def _dropdown(name: str, label: str, offered: list[Option], value: Any, *, multi: bool) -> Component:
    dropdown = dcc.Dropdown(
        id={"type": "choice", "name": name},
        options=[_offer(option) for option in offered],
        value=[_sent(one) for one in value] if multi else _sent(value),
        multi=multi,
        clearable=multi,
        placeholder="all",
    )
    return html.Label([html.Span(label), dropdown], className="many" if multi else "one")
