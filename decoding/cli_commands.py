"""What commands do: `decoding generate | compare | race | film | report | judge | assess | calibrate | models`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

# Imports are made where they are needed: what one command uses, another should not wait for.
from decoding.cli_options import load, params_of, prompt_of

if TYPE_CHECKING:
    from decoding.report import Run


def run_generate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.api import generate, resolve
    from decoding.cli_evaluate import print_account

    strategy = resolve(options.strategy)
    params = params_of(options)
    lm = load(options, Console(stderr=True))
    prompt = prompt_of(options)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    generation = generate(prompt, lm, strategy=strategy, params=params, on_text=show)
    print()
    if options.metrics:
        for name, value in vars(generation.metrics).items():
            print(f"{name:>22}  {value:.4g}", file=sys.stderr)
        print_account(lm)
    if generation.error is not None:
        print(f"decoding generate: error: {generation.error}", file=sys.stderr)
        return 2
    return 0


def run_compare(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    from decoding.cli_evaluate import print_account
    from decoding.comparison import Comparison, execute
    from decoding.config import RunConfig, read_run_file
    from decoding.errors import InvalidRequest
    from decoding.progress import Live
    from decoding.report import print_summary, read_run, run_directory, summarize, write_report

    if options.resume is not None and (options.output is not None or options.config is not None):
        raise InvalidRequest("--resume goes on with the run in DIR as it was; leave --output and --config out.")
    resumed = None if options.resume is None else run_directory(options.resume)
    written = None
    if resumed is not None:
        written = RunConfig.of_header(read_run(resumed).header.config)
    elif options.config is not None:
        written = read_run_file(options.config)
    if written is not None:  # --stop adds to its default, which it is to replace
        options = options.again({**written.flat(), **({"stop": []} if options.stop else {})})
    config = RunConfig.of_flat(vars(options))
    comparison = Comparison.of(config)
    output = resumed or options.output or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    console = Console(stderr=True)
    with console.status(escape(f"loading {config.model}")):
        lm = config.load.load(config.model)
    try:
        with Live(comparison, console) as live:
            notices = execute(comparison, lm, output, config=config, resume=resumed is not None, progress=live.update)
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: decoding compare --resume {output}", file=sys.stderr)
        return 130
    for notice in notices:
        print(notice, file=sys.stderr)
    run = read_run(output)
    summary = summarize(run)
    print_summary(summary)
    print_account(lm)
    print(f"records: {output / 'records.jsonl'}\nreport:  {write_report(run, output, summary=summary)}")
    failed = [row.strategy for row in summary.strategies if row.failures == row.answers]
    if failed:
        print(
            f"decoding compare: error: {', '.join(failed)} gave no complete answer, as the report explains; try again "
            f"with: decoding compare --resume {output}",
            file=sys.stderr,
        )
        return 2
    return 0


def run_race(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    from decoding.api import resolve
    from decoding.errors import InvalidRequest
    from decoding.race import race, replay, result_table

    if not options.speed > 0:
        raise InvalidRequest(f"speed must be a positive number, not {options.speed}.")
    strategies = [resolve(text) for text in options.strategies]
    params = params_of(options)
    console, errors = Console(), Console(stderr=True)
    lm = load(options, errors)
    prompt = prompt_of(options)
    with errors.status("") as status:
        lanes = race(prompt, lm, strategies, params, on_start=lambda s: status.update(escape(f"{s} runs alone")))
    replay(lanes, console, speed=options.speed)
    console.print(result_table(lanes))
    failed = [lane for lane in lanes if lane.generation.error is not None]
    for lane in failed:
        print(f"decoding race: error: {lane.strategy}: {lane.generation.error}", file=sys.stderr)
    return 2 if failed else 0


def run_film(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.api import resolve
    from decoding.report.film import print_film, shoot, write_film

    strategy = resolve(options.strategy)
    params = params_of(options)
    lm = load(options, Console(stderr=True))
    prompt = prompt_of(options)
    film = shoot(prompt, lm, strategy=strategy, params=params)
    print_film(film)
    if options.output is not None:
        print(f"film: {write_film(film, options.output)}")
    if film.generation.error is not None:
        print(f"decoding film: error: {film.generation.error}", file=sys.stderr)
        return 2
    return 0


def run_report(options: argparse.Namespace) -> int:
    from decoding import report

    run = report.read_run(options.directory)
    if options.other is not None:
        folders = [path if os.path.isdir(path) else path.parent for path in (options.directory, options.other)]
        run, other = _told_apart([run, report.read_run(options.other)], folders)
        comparison = report.compare_runs(run, other)
        report.print_comparison(comparison)
        for path in options.export:
            report.export_comparison(comparison, path)
        page = folders[1] / f"against-{run.name.replace('/', '-')}.html"
        print(f"report: {report.write_comparison(comparison, page)}")
        return 0
    directory = report.run_directory(options.directory)
    summary = report.summarize(run)
    report.print_summary(summary)
    for path in options.export:
        report.export(run, path, summary=summary)
    print(f"report: {report.write_report(run, directory, summary=summary)}")
    return 0


def _told_apart(runs: list[Run], folders: list[Path]) -> list[Run]:
    """Runs of one name under as much of their paths as tells them apart."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    shared = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    names = [Path(os.path.relpath(folder, shared)).as_posix() for folder in folders]
    return [replace(run, name=run.name if name == "." else name) for run, name in zip(runs, names, strict=True)]


def run_judge(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.cli_evaluate import judge

    return judge(options, load(options, Console(stderr=True)))


def run_assess(options: argparse.Namespace) -> int:
    from decoding.cli_evaluate import assess

    return assess(options)


def run_calibrate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.backends.local import LocalBackend
    from decoding.calibrate import calibrate
    from decoding.errors import InvalidRequest

    if options.plot is not None and not os.path.isdir(options.plot.parent):
        raise InvalidRequest(f"there is no folder {str(options.plot.parent)!r} for the plot; make it first.")
    console = Console()
    backend = load(options, console)
    if not isinstance(backend, LocalBackend):
        raise InvalidRequest("a server's steps cannot be measured from here; leave --base-url out.")
    with console.status("measuring steps; nothing else should run"):
        result = calibrate(backend)
    console.print(result.table())
    if options.plot is not None:
        result.plot(options.plot)
        print(f"plot: {options.plot}")
    return 0


def run_models(_: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from decoding.models import Alias, aliases
    from decoding.strategies.adapter import about, shipped_adapters
    from drafters.heads.fitting import shipped_heads

    def where(alias: Alias) -> str:
        return f"not installed: {alias.install}" if alias.paths is None else str(alias.paths[0])

    rows = {
        "model": [(alias.name, alias.description, where(alias)) for alias in aliases()],
        "adapter": [(f"jacobi(adapter={name})", about(path), str(path)) for name, path in shipped_adapters().items()],
        "drafter": [(head.kind, str(head), str(head.folder)) for head in shipped_heads()],
    }
    console = Console()
    for kind, found in rows.items():
        table = Table(box=None, pad_edge=False)
        for column in (kind, "", "where"):
            table.add_column(column, overflow="fold")
        for row in found:
            table.add_row(*map(Text, row))
        if found:
            console.print(table)
    print("Any local folder in Hugging Face's layout, .gguf file or hub id (owner/name) works as a model, too;")
    print("any folder of an adapter or a head as jacobi(adapter=FOLDER), eagle3(head=FOLDER), medusa(head=FOLDER).")
    return 0
