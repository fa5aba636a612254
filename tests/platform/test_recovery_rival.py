"""What the comparison with Ray Train says of its rounds; the trainings themselves are run by jobs/recovery_rival.py."""

from __future__ import annotations

from jobs.recovery_rival import summary
from raybsa.experiments.recovery_rival import RIVAL, Killed


def test_a_line_a_system_with_its_median_beside_the_rival_s() -> None:
    ours, theirs = [Killed("ours", s, "a") for s in (0.2, 0.1, 9.0)], [Killed(RIVAL, s, "a") for s in (4.0, 6.0, 5.0)]
    lines = summary({"ours": ours, RIVAL: theirs})
    assert lines[0].split() == ["ours", "median", "0.20", "s,", "25.0", "x"]
    assert lines[1].split()[-2:] == ["1.0", "x"]
    assert lines[2] == "weights at the end: equal, to the bit"


def test_other_weights_are_told() -> None:
    found = {"ours": [Killed("ours", 1.0, "a")], RIVAL: [Killed(RIVAL, 1.0, "b")]}
    assert summary(found)[-1] == "weights at the end: DIFFERENT"
