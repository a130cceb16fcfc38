"""The report as one self-contained HTML file.

Nothing is fetched: styles and scripts are inlined, and a content security policy admits only this very script, so
that no text of a question or an answer can ever run. Figures are drawn by the page from the summary; each
question's answers lie in their own script tag and are parsed only when somebody opens that question.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from decoding.errors import RecordError
from decoding.report.compared import RunComparison, flatten, verdict
from decoding.report.definitions import DEFINITIONS, OF_TWO_RUNS
from decoding.report.page_data import page_data, question_data
from decoding.report.redaction import Json
from decoding.report.runfile import Run, is_records
from decoding.report.summary import Summary, summarize
from decoding.report.table import columns, comparison_cells, headline, number, signed

FILE = "report.html"
"""Name of the report within a run directory."""

_SCRIPTS = ("svg.js", "figures.js", "steps.js", "timeline.js", "explorer.js", "page.js")


def write_report(run: Run, path: str | os.PathLike[str], *, summary: Summary | None = None) -> Path:
    """Write the report of a run to `path`, or into it as `report.html` if it is a directory; returns the file.

    `summary` saves computing it again. Raises RecordError if the file cannot be written, or holds records.
    """
    target = Path(path)
    return _save(render(run, summary or summarize(run)), target / FILE if target.is_dir() else target)


def write_comparison(comparison: RunComparison, path: str | os.PathLike[str]) -> Path:
    """Write the comparison of two runs as a page to the file `path`. Raises RecordError as `write_report` does."""
    return _save(render_comparison(comparison), Path(path))


def _save(page: str, target: Path) -> Path:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if is_records(target):
            raise RecordError(f"{target} is for the records of a run; give the page another name.")
        # Half a surrogate pair in a model's text has no UTF-8; a replacement sign may stand for it here.
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordError(f"{target} could not be written ({error.strerror}).") from error
    return target


def render(run: Run, summary: Summary) -> str:
    """The page as text."""
    script = "\n".join(["(() => {", '"use strict";', *map(_asset, _SCRIPTS), "})();"])
    shown = columns(summary)
    settings: dict[str, Json] = {"environment": dataclasses.asdict(run.header.environment)}
    return _template("report.html.j2").render(
        run=run,
        summary=summary,
        headline=_breakable(headline(summary)),
        breakable=_breakable,
        number=number,
        signed=signed,
        columns=shown,
        definitions=DEFINITIONS,
        config=list(flatten(run.header.config)),
        environment=[(name.removeprefix("environment."), value) for name, value in flatten(settings)],
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_json(page_data(run, summary)),
        questions=[_json(question) for question in question_data(run)],
    )


def render_comparison(comparison: RunComparison) -> str:
    """The page of a comparison; it needs no script."""
    head, rows = comparison_cells(comparison)
    return _template("runs.html.j2").render(
        names=comparison.names,
        verdict=_breakable(verdict(comparison)),
        head=head,
        rows=rows,
        breakable=_breakable,
        axis=_axis(comparison),
        changes=comparison.changes,
        missing=comparison.missing,
        settings=comparison.settings,
        definitions=OF_TWO_RUNS.values(),
        style=Markup(_asset("style.css")),
    )


@dataclass(frozen=True)
class RatioAxis:
    """A logarithmic axis of ratios across the width of a page; places are percentages."""

    low: float
    high: float

    def at(self, ratio: float) -> float:
        return round(100 * math.log(ratio / self.low) / math.log(self.high / self.low), 3)

    @property
    def marks(self) -> list[float]:
        return [mark for mark in _RATIOS if self.low <= mark <= self.high]


_RATIOS = (0.1, 0.2, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def _axis(comparison: RunComparison) -> RatioAxis:
    """An axis that holds every interval of `faster`, and 1."""
    ends = [end for change in comparison.changes for end in dataclasses.astuple(change.faster)[:3] if end > 0]
    finite = [1.0, *(end for end in ends if math.isfinite(end))]
    return RatioAxis(min(0.87, min(finite) * 0.94), max(1.15, max(finite) * 1.06))


def _template(name: str) -> jinja2.Template:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("decoding.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(name)


def _asset(name: str) -> str:
    return (resources.files("decoding.report") / "page" / name).read_text(encoding="utf-8")


def _breakable(text: str) -> Markup:
    """`text` with places where a line may end inside strategies' text forms: after `(`, `,` and `=` of an option."""
    return Markup("<wbr>").join(re.split(r"(?<=\w[(,=])(?=\S)", text))


def _json(value: Mapping[str, Json]) -> Markup:
    """JSON that cannot end the script tag it stands in: no `<`, `>` or `&` is left as itself."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
