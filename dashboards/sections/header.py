"""What was asked, where, with what and when; and what the colours mean."""

from __future__ import annotations

from dashboards.frames import Results
from dashboards.markup import Markup, element
from dashboards.sections.frame import asked, listed
from dashboards.theme import DENSITY_LABELS
from dashboards.wording import EARLIER_DENSITY, moment


def header(results: Results, folder: str) -> Markup:
    facts = [
        ("Asked", "; ".join(dict.fromkeys(asked(trial) for trial in results.trials))),
        ("Device", _device(results)),
        ("Versions", _versions(results)),
        ("When", _when(results)),
        ("Runs", f"{_count(results)}; {listed(t.record.run_id for t in results.trials)}; results in {folder}"),
    ]
    if earlier := sum(not trial.spec.is_current for trial in results.trials):
        facts.append(("Earlier rows", f"{earlier} whose {EARLIER_DENSITY[4:]}: they stand apart"))
    pairs = (part for name, value in facts for part in (element("dt", name), element("dd", value)))
    question = "Which block-sparse pattern gives the best quality for its cost?"
    if results.only_kernels:
        question = "How fast are the kernels, and who is faster?"
    return element(
        "header",
        element("h1", "raybsa report"),
        element("p", question),
        element("dl", *pairs, class_="facts"),
        None if results.only_kernels else density_legend(),
    )


def _device(results: Results) -> str:
    records = [trial.record for trial in results.trials]
    threads = listed(str(record.num_threads) for record in records if record.num_threads)
    devices = listed(record.device_name or record.device for record in records)
    word = "thread" if threads == "1" else "threads"
    return (f"{devices}, {threads} {word}" if threads else devices) or "not recorded"


def _versions(results: Results) -> str:
    records = [trial.record for trial in results.trials]
    versions = {
        "raybsa": listed(record.raybsa_version for record in records),
        "torch": listed(record.torch_version for record in records),
        "Ray": listed(record.ray_version for record in records),
        "Python": listed(record.python_version for record in records),
        "commit": listed((record.git_commit or "")[:12] for record in records),
    }
    return ", ".join(f"{name} {text}" for name, text in versions.items() if text) or "not recorded"


def _when(results: Results) -> str:
    times = sorted(trial.record.created_at for trial in results.trials if trial.record.created_at)
    return " to ".join(dict.fromkeys([moment(times[0]), moment(times[-1])])) if times else "not recorded"


def _count(results: Results) -> str:
    failed, pruned = len(results.failures), sum(trial.pruned for trial in results.trials)
    told = [f"{len(results.trials)} trials"]
    told += [f"{failed} failed"] * bool(failed) + [f"{pruned} stopped early"] * bool(pruned)
    return ", ".join(told)


def density_legend(*, ideal: bool = True) -> Markup:
    """What the colours of densities and baselines mean; ``ideal``: that of the ideal line too."""

    def swatch(text: str, kind: str, style: str | None = None) -> Markup:
        return element("span", element("i", class_=f"swatch {kind}", style=style), text)

    densities = (
        swatch(text, "density", f"background:var(--density{index})") for index, text in enumerate(DENSITY_LABELS)
    )
    return element(
        "div",
        element("span", "Blocks kept (density):"),
        *densities,
        swatch("dense baseline (torch SDPA)", "dense"),
        swatch("dominated", "dominated"),
        swatch("ideal: dense × density", "ideal") if ideal else None,
        class_="legend",
    )
