"""Claims: which questions of a results folder are being asked now, so that two searches in it ask none twice.

``.raybsa/searches/<id>`` names the process of a search, ``.raybsa/claims/<digest>`` a question that it asks. A search
on this host lives as its process does; one on another host as long as it touches its file. On object stores, which
create no file exclusively, two searches that claim one question within the same second may both get it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from raybsa.holder import Holder
from raybsa.results.record import Record, spec_of
from raybsa.results.store import Store, StoreError
from raybsa.spec import TrialSpec

_BEAT_S, _SILENT_S = 20.0, 180.0


class Claims:
    """The claims of one search; ``close`` lets go of them. Those of processes that are no more are taken over.

    Args:
        store: the folder.
        is_asked: whether a question belongs to this search: those of others in the folder are none of its business.
        yields: whether it leaves to others what they ask; else it asks all its questions, and only lets others know.
        say: told once of each other search that is under way.
    """

    def __init__(
        self, store: Store, is_asked: Callable[[TrialSpec], bool], *, yields: bool, say: Callable[[str], None] = print
    ) -> None:
        self._store, self._is_asked, self._yields, self._say = store, is_asked, yields, say
        self._searches, self._claims = store.shared(".raybsa/searches"), store.shared(".raybsa/claims")
        me = Holder.me()
        self._id = f"{me.host}-{me.pid}-{secrets.token_hex(4)}"
        self._own, self._held, self._known = set[str](), set[str](), set[str]()
        self._answered, self._told = set[str](), set[str]()
        self._read_files = {file.path for file in store.files("records")}
        self._searches.create(self._id, json.dumps(me.to_dict()).encode())
        self._tidy()
        self._alone_at, self._had_company, self._beaten = self._searches.stamp(), False, time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: they are this process's. Tune writes down what its callbacks hold, and no one reads that again."""
        return {}

    def know(self, digests: Iterable[str]) -> None:
        """Questions that count as answered before this search began."""
        self._known.update(digests)

    def take(self, spec: TrialSpec) -> bool:
        """Whether this search may ask a question: no other asks it, or has answered it meanwhile."""
        digest, claim = spec.digest, json.dumps({"search": self._id, "spec": spec.to_dict()}).encode()
        mine = self._claims.create(digest, claim)
        if not mine and not self._is_live(str(self._claim(digest).get("search", ""))):
            mine = self._claims.take_away(digest) and self._claims.create(digest, claim)
        if mine:
            self._held.add(digest)
        if self._yields and (not mine or (self._has_company() and digest in self._answered_meanwhile())):
            self.release(digest)
            return False
        self._own.add(digest)
        return True

    def release(self, digest: str) -> None:
        """Once its answer is stored, others find that."""
        if digest in self._held:
            self._held.remove(digest)
            with suppress(OSError):  # a folder that went or can only be read: the claim ends with its process
                self._claims.take_away(digest)

    def elsewhere(self) -> int:
        """How many questions of this search others ask now or have answered since it began."""
        if time.monotonic() - self._beaten > _BEAT_S:
            self._beaten = time.monotonic()
            self._searches.touch(self._id)
        if not self._yields or not self._has_company():
            return 0
        asked = {name for name in self._claims.names() if name not in self._own and self._is_of_another(name)}
        return len((asked | self._answered_meanwhile()) - self._own - self._known)

    def close(self) -> None:
        """Safe to call twice."""
        for digest in list(self._held):
            self.release(digest)
        with suppress(OSError):
            self._searches.take_away(self._id)

    # ---- for ourselves -----------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Takes away what searches left that are no more."""
        live = {search for search in self._searches.names() if self._is_live(search)}
        for search in set(self._searches.names()) - live:
            self._searches.take_away(search)
        for name in self._claims.names():
            if self._claim(name).get("search", "") not in live | {""}:
                self._claims.take_away(name)

    def _has_company(self) -> bool:
        """Whether there was another search at any time since this one began."""
        came_or_went = self._searches.stamp() != self._alone_at
        self._had_company = self._had_company or came_or_went or len(self._searches.names()) > 1
        return self._had_company

    def _claim(self, name: str) -> dict[str, Any]:
        """A claim; nothing where it is gone, or not written to its end yet."""
        try:
            return dict(json.loads(self._claims.read(name)))
        except (OSError, ValueError):
            return {}

    def _is_of_another(self, name: str) -> bool:
        """Whether a claim is a living search's, and on a question of this one."""
        claim = self._claim(name)
        try:
            return self._is_live(str(claim["search"])) and self._is_asked(TrialSpec.from_dict(claim["spec"]))
        except (KeyError, ValueError, TypeError):
            return False

    def _is_live(self, search: str) -> bool:
        try:
            holder = Holder.from_dict(json.loads(self._searches.read(search)))
        except (OSError, ValueError, TypeError):
            return False
        live = holder.is_running if holder.is_here else self._searches.age_s(search) < _SILENT_S
        if live and self._yields and search not in {self._id, *self._told}:
            self._told.add(search)
            self._say(f"{holder}, searches in {self._store.root} too: what it asks is not asked again")
        return live

    def _answered_meanwhile(self) -> set[str]:
        """Digests of the questions of this search that others answered since it began."""
        for file in self._store.files("records"):
            if file.path not in self._read_files:
                self._read_files.add(file.path)
                self._answered |= {record.spec_hash for record in self._rows(file.path) if self._counts(record)}
        return self._answered

    def _rows(self, path: str) -> list[Record]:
        try:
            return self._store.rows(Record, path)
        except (StoreError, FileNotFoundError):
            return []

    def _counts(self, record: Record) -> bool:
        try:
            return record.spec_hash not in self._own and self._is_asked(spec_of(record))
        except ValueError:
            return False
