"""Rewrite the table of results in `experiments/README.md` from the files in `experiments/results/`.

    python -m experiments.index [--check]

No figure in that table is typed by hand: every line comes from the JSON file that a script wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from decoding.cli import exit_code
from decoding.errors import RecordError
from decoding.report.fields import get

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by python -m experiments.index -->", "<!-- end of results -->"


def table(results: Path) -> str:
    """The results as a Markdown table, and the machines. Raises RecordError for a file that is not a result."""
    rows, machines = [], []
    for path in sorted(results.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if "verdict" not in data:
                continue  # figures of a script that checks no claim
            claim, source, measured, verdict, command = (
                get(data, name, str) for name in ("claim", "source", "measured", "verdict", "command")
            )
            machine = get(data, "environment", dict)
        except (ValueError, AttributeError, RecordError) as error:
            raise RecordError(f"{path} is not a result of these scripts ({error}); run its script again.") from None
        cells = [f"{claim} ({source})", measured, f"**{verdict}**", f"`{command}`"]
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        where = f"{machine.get('processor')}, {machine.get('threads')} threads"
        machines.append(f"{where}, {data.get('model')} in {machine.get('dtype')}")
    if not rows:
        return "No script has been run yet.\n"
    head = ["| claim | measured | verdict | command |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"Measured on: {'; '.join(dict.fromkeys(machines))}."]) + "\n"


def rewritten(text: str, results: Path) -> str:
    """`text` with a new table between its two marks. Raises RecordError if a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RecordError(f"the README lacks the marks around its results; put {BEGIN} and {END} back.")
    return f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the table is up to date")
    options = parser.parse_args()
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = rewritten(text, HERE / "results")
    if options.check:
        raise SystemExit(0 if new == text else "experiments/README.md is out of date; run python -m experiments.index.")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
