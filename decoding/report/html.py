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
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from decoding.errors import RecordError
from decoding.report.compared import flatten
from decoding.report.definitions import DEFINITIONS
from decoding.report.page_data import page_data, question_data
from decoding.report.redaction import Json
from decoding.report.runfile import Run
from decoding.report.summary import Summary, summarize
from decoding.report.table import columns, headline

FILE = "report.html"
"""Name of the report within a run directory."""

_SCRIPTS = ("svg.js", "figures.js", "steps.js", "timeline.js", "explorer.js", "page.js")


def write_report(run: Run, path: str | os.PathLike[str], *, summary: Summary | None = None) -> Path:
    """Write the report of a run to `path`, or into it as `report.html` if it is a directory; returns the file.

    `summary` saves computing it again. Raises RecordError if the file cannot be written.
    """
    target = Path(path)
    target = target / FILE if target.is_dir() else target
    page = render(run, summary or summarize(run))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decoding.report", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        summary=summary,
        headline=_breakable(headline(summary)),
        breakable=_breakable,
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


def _asset(name: str) -> str:
    return (resources.files("decoding.report") / "page" / name).read_text(encoding="utf-8")


def _breakable(text: str) -> Markup:
    """`text` with places where a line may end inside strategies' text forms: after `(`, `,` and `=` of an option."""
    return Markup("<wbr>").join(re.split(r"(?<=\w[(,=])(?=\S)", text))


def _json(value: Mapping[str, Json]) -> Markup:
    """JSON that cannot end the script tag it stands in: no `<`, `>` or `&` is left as itself."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
