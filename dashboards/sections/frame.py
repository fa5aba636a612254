"""What every section shares: its heading, how it says that nothing is there, and how it lists."""

from __future__ import annotations

from collections.abc import Iterable

from dashboards.frames import COMPRESSION, Trial
from dashboards.markup import Child, Markup, element
from dashboards.wording import question_label
from raybsa.spec import UNTRAINED


def section(identifier: str, title: str, *children: Child) -> Markup:
    return element("section", element("h2", title), *children, id=identifier)


def note(text: str) -> Markup:
    return element("p", text, class_="note")


def nothing_yet(what: str, command: str) -> Markup:
    """Instead of an empty section: what is missing and what to run."""
    return element("p", f"{what}. Run ", element("code", command), ".")


def listed(values: Iterable[str]) -> str:
    """Each value once, in order of appearance; empty ones are left out."""
    return ", ".join(dict.fromkeys(value for value in values if value))


def asked(trial: Trial) -> str:
    """A trial's question in one line, its lengths included where it trains."""
    spec = trial.spec
    trained = "" if spec.task in UNTRAINED else f", trained at {spec.train_len:,} tokens"
    timed = "" if spec.task in (*UNTRAINED, COMPRESSION) else f", timed at {spec.seq_len:,}"
    return f"{spec.task}: {question_label(spec)}{trained}{timed}"
