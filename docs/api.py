"""The API reference, made from docstrings by pdoc: a folder of HTML pages.

    python docs/api.py build/api

``PAGES`` is what a user imports, and ``raybsa`` brings its ``gradients`` and ``patterns`` with it; what else is in the
package is for those who change it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pdoc
import pdoc.render

PAGES = (
    "raybsa",
    "raybsa.comm",
    "raybsa.events",
    "raybsa.experiments.search",
    "raybsa.experiments.space",
    "raybsa.gradients.codec",
    "raybsa.gradients.wire",
    "raybsa.layout",
    "raybsa.patterns.pattern",
    "raybsa.results.pareto",
    "raybsa.results.record",
    "raybsa.results.store",
    "raybsa.spec",
    "raybsa.tasks.capture",
    "raybsa.tasks.model",
    "raybsa.tasks.params",
    "raybsa.tasks.question",
    "raybsa.tasks.training",
    "raybsa.variants.hf",
    "raybsa.variants.selector",
    "raybsa.variants.source",
    "raybsa.variants.swap",
)
LAZY = ("raybsa", "raybsa.gradients", "raybsa.patterns")


def write(folder: Path, pages: Sequence[str] = PAGES) -> None:
    """Writes a page for each module, and a search index."""
    for name in LAZY:  # pdoc reads a module's dict, where their names are only once they were asked for
        module = importlib.import_module(name)
        vars(module).update({public: getattr(module, public) for public in module.__all__})
    pdoc.render.configure(docformat="google", footer_text="raybsa")
    pdoc.pdoc(*pages, output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/api.py FOLDER")
    write(Path(sys.argv[1]))
    print(Path(sys.argv[1]) / "index.html")
