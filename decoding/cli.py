"""The command line: `decoding --help` lists the commands."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

    from decoding.backends.base import Backend
    from decoding.types import SamplingParams

# Imports are made where they are needed: `--help` and a mistyped option should not wait for torch.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after one sentence on standard error that says what is wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = _parser(arguments).parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    from decoding.errors import DecodingError

    try:
        result: int = options.run(options)
        return result
    except DecodingError as error:
        print(f"decoding {options.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; there is nobody to tell
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str] | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="decoding",
        description="Parallel decoding: skeleton-of-thought, speculation and iterative refinement on one engine.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more about what is going on")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    wanted = sys.argv[1:] if arguments is None else list(arguments)
    catalogue = _catalogue() if {"-h", "--help"} & set(wanted) else ""

    def command(name: str, summary: str, run: object, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", "answer one prompt, streaming it to the terminal", _generate, catalogue)
    generate.add_argument("prompt", help="the question; - reads it from standard input")
    generate.add_argument("--strategy", default="autoregressive", help="strategy, in text form")
    _model_options(generate)
    _sampling_options(generate)
    generate.add_argument("--metrics", action="store_true", help="print the metrics on standard error afterwards")

    compare = command("compare", "answer questions with several strategies, side by side", _compare, catalogue)
    compare.add_argument("questions", nargs="?", default="default", help="a question file or a shipped suite")
    compare.add_argument("--config", metavar="FILE", help="a run file, or a shipped one's name; options override it")
    compare.add_argument(
        "--strategies",
        nargs="+",
        default=["autoregressive", "speculative", "jacobi", "skeleton"],
        metavar="STRATEGY",
        help="strategies, in text form; 'autoregressive' is the baseline",
    )
    compare.add_argument("--limit", type=int, help="only the first N questions")
    compare.add_argument("--categories", nargs="+", metavar="CATEGORY", help="only these categories")
    compare.add_argument("--output", type=Path, help="run directory (runs/DATE-TIME)")
    compare.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR, configured as it was")
    schedule = compare.add_argument_group("schedule")
    schedule.add_argument("--repeats", type=int, default=1, help="times every answer is made (%(default)s)")
    schedule.add_argument("--streams", type=int, default=1, help="questions answered at once (%(default)s)")
    schedule.add_argument("--warm-up", type=int, default=1, help="unrecorded answers per strategy (%(default)s)")
    schedule.add_argument("--cool-down", type=float, default=0.0, metavar="SECONDS", help="rest before each turn")
    _model_options(compare)
    _sampling_options(compare)
    compare.add_argument("--ignore-eos", action="store_true", help="answers of full length, for measurements")

    def again(defaults: dict[str, object]) -> argparse.Namespace:
        """The same command line once more, over other defaults: those of a run file."""
        compare.set_defaults(**defaults)
        return parser.parse_args(arguments)

    compare.set_defaults(again=again)

    race = command(
        "race", "let strategies answer one question, and watch the answers grow side by side", _race, catalogue
    )
    race.add_argument("prompt", help="the question; - reads it from standard input")
    race.add_argument(
        "--strategies", nargs="+", default=["autoregressive", "speculative", "jacobi"], metavar="STRATEGY"
    )
    race.add_argument("--speed", type=float, default=1.0, help="of the replay; 2 is twice as fast (%(default)s)")
    _model_options(race)
    _sampling_options(race)

    film = command("film", "answer one prompt, and show what every iteration's block held", _film, catalogue)
    film.add_argument("prompt", help="the question; - reads it from standard input")
    film.add_argument("--strategy", default="jacobi", help="strategy, in text form (%(default)s)")
    film.add_argument("--output", type=Path, metavar="FILE", help="also write the film as an HTML page")
    _model_options(film)
    _sampling_options(film)

    report = command("report", "make the table and the HTML page of a run again, or compare two runs", _report)
    report.add_argument("directory", type=Path, help="run directory")
    report.add_argument("other", type=Path, nargs="?", help="another run, to compare with")
    report.add_argument(
        "--export", nargs="+", type=Path, default=[], metavar="FILE", help="also as .csv, .parquet, .md"
    )

    judge = command("judge", "let a model compare a run's answers with plain decoding's, in both orders", _judge)
    judge.add_argument("directory", type=Path, help="run directory; the verdicts are added to it")
    judge.add_argument("--strategies", nargs="+", metavar="STRATEGY", help="only these (all that change the answer)")
    judge.add_argument("--prompt", default="pair", help="a template under prompts/judge (%(default)s)")
    judge.add_argument("--templates", metavar="DIR", help="a folder whose templates go before the shipped ones")
    judge.add_argument("--max-new-tokens", type=int, default=512, help="of a judgment (%(default)s)")
    _model_options(judge)

    assess = command("assess", "say about a run's answers what can be said without a judge", _assess)
    assess.add_argument("directory", type=Path, help="run directory; the figures are added to it")
    assess.add_argument("--similarity", action="store_true", help="in meaning, to plain decoding's answer")
    assess.add_argument("--encoder", metavar="DIR", help="a sentence encoder instead of the extra's")
    assess.add_argument("--perplexity", metavar="MODEL", help="of the answers under this local model")

    calibrate = command("calibrate", "measure what a step costs on this machine; widths are chosen by it", _calibrate)
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help="draw it as SVG, with the roofline's floors")
    _model_options(calibrate)

    command("models", "list the models that can be named, and where they are", _models)
    return parser


def _catalogue() -> str:
    """Every strategy, drafter and model, for `--help`."""
    from decoding import drafting
    from decoding.models import aliases
    from decoding.strategies import REGISTRY
    from decoding.strategies.policies import REGISTRY as POLICIES

    def lines(title: str, rows: Sequence[tuple[str, str]]) -> str:
        width = max(len(name) for name, _ in rows)
        return title + "\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)

    return "\n\n".join(
        [
            lines("strategies:", [(name, strategy.summary) for name, strategy in REGISTRY.items()]),
            lines("drafters, for speculative(drafter=...):", [(n, d.summary) for n, d in drafting.names().items()]),
            lines("commit policies, for block-diffusion(policy=...):", [(n, p.summary) for n, p in POLICIES.items()]),
            lines("models:", [(a.name, a.description) for a in aliases()]),
            "Options go in parentheses and may nest: 'skeleton(inner=speculative(drafter=prompt-lookup))'.",
        ]
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2-135m", help="alias, folder, .gguf file or hub id (%(default)s)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (a GPU if there is one)")
    group.add_argument("--dtype", help="float32, bfloat16, float16 (float32 on a CPU)")
    group.add_argument("--weights", default="float32", help="float32, or int8, which a CPU reads faster (%(default)s)")
    group.add_argument("--device-map", help="spread the model over devices, e.g. auto")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that a model ships")
    group.add_argument("--slots", type=int, default=32, help="sequences held in the cache at once (%(default)s)")
    group.add_argument("--capacity", type=int, help="tokens per sequence (the context, at most 2048)")
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", metavar="URL", help="ask an OpenAI-compatible server for --model instead")
    group.add_argument("--api-key-env", metavar="VAR", help="variable that holds its key (OPENAI_API_KEY)")
    group.add_argument("--endpoint", default="chat", help="chat or completions (%(default)s)")
    group.add_argument("--concurrency", type=int, default=32, help="calls under way at once (%(default)s)")
    group.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for each event (%(default)s)")
    group.add_argument("--retries", type=int, default=4, help="further attempts after a fault (%(default)s)")
    group.add_argument(
        "--prefill",
        action=argparse.BooleanOptionalAction,
        help="whether it continues a message that was begun for it (found out)",
    )
    group.add_argument(
        "--warm-prefix", type=int, default=0, metavar="CHARS", help="of calls that begin with the same CHARS, one first"
    )
    group.add_argument("--extra-body", action="store_true", help="it takes vLLM's parameters (top_k, min_p, ...)")
    group.add_argument(
        "--prices",
        nargs=3,
        type=float,
        metavar=("PROMPT", "CACHED", "COMPLETION"),
        help="money per million tokens, to tell the cost",
    )


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    group.add_argument("--min-new-tokens", type=int, default=0)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--repetition-penalty", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here; repeatable")


def _params(options: argparse.Namespace) -> SamplingParams:
    from decoding.types import SamplingParams

    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        stop=options.stop,
    )


def _load(options: argparse.Namespace, console: Console) -> Backend:
    from decoding.config import LoadOptions

    how = LoadOptions(**{item.name: getattr(options, item.name) for item in fields(LoadOptions)})
    with console.status(f"loading {options.model}"):
        return how.load(options.model)


def _generate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.api import generate, resolve
    from decoding.cli_evaluate import print_account

    strategy = resolve(options.strategy)
    params = _params(options)
    lm = _load(options, Console(stderr=True))
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt

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


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.cli_evaluate import print_account
    from decoding.comparison import Comparison, execute
    from decoding.config import RunConfig, read_run_file
    from decoding.errors import InvalidRequest
    from decoding.progress import Live
    from decoding.report import print_summary, read_run, summarize, write_report

    if options.resume is not None and (options.output is not None or options.config is not None):
        raise InvalidRequest("--resume goes on with the run in DIR as it was; leave --output and --config out.")
    if options.resume is not None:
        options = options.again(RunConfig.of_header(read_run(options.resume).header.config).flat())
    elif options.config is not None:
        options = options.again(read_run_file(options.config).flat())
    config = RunConfig.of_flat(vars(options))
    comparison = Comparison.of(config)
    output = options.resume or options.output or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    console = Console(stderr=True)
    with console.status(f"loading {config.model}"):
        lm = config.load.load(config.model)
    try:
        with Live(comparison, console) as live:
            resume = options.resume is not None
            notices = execute(comparison, lm, output, config=config, resume=resume, progress=live.update)
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: decoding compare --resume {output}", file=sys.stderr)
        return 130
    for notice in notices:
        print(notice, file=sys.stderr)
    run = read_run(output)
    print_summary(summarize(run))
    print_account(lm)
    print(f"records: {output / 'records.jsonl'}\nreport:  {write_report(run, output)}")
    return 0


def _race(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.api import resolve
    from decoding.errors import InvalidRequest
    from decoding.race import race, replay, result_table

    if not options.speed > 0:
        raise InvalidRequest(f"speed must be a positive number, not {options.speed}.")
    strategies = [resolve(text) for text in options.strategies]
    params = _params(options)
    console, errors = Console(), Console(stderr=True)
    lm = _load(options, errors)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    with errors.status("") as status:
        lanes = race(prompt, lm, strategies, params, on_start=lambda strategy: status.update(f"{strategy} runs alone"))
    replay(lanes, console, speed=options.speed)
    console.print(result_table(lanes))
    failed = [lane for lane in lanes if lane.generation.error is not None]
    for lane in failed:
        print(f"decoding race: error: {lane.strategy}: {lane.generation.error}", file=sys.stderr)
    return 2 if failed else 0


def _film(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.api import resolve
    from decoding.report.film import print_film, shoot, write_film

    strategy = resolve(options.strategy)
    params = _params(options)
    lm = _load(options, Console(stderr=True))
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    film = shoot(prompt, lm, strategy=strategy, params=params)
    print_film(film)
    if options.output is not None:
        print(f"film: {write_film(film, options.output)}")
    if film.generation.error is not None:
        print(f"decoding film: error: {film.generation.error}", file=sys.stderr)
        return 2
    return 0


def _report(options: argparse.Namespace) -> int:
    from decoding import report

    run = report.read_run(options.directory)
    if options.other is not None:
        comparison = report.compare_runs(run, report.read_run(options.other))
        report.print_comparison(comparison)
        for path in options.export:
            report.export_comparison(comparison, path)
        page = options.other if options.other.is_dir() else options.other.parent
        print(f"report: {report.write_comparison(comparison, page / f'against-{run.name}.html')}")
        return 0
    summary = report.summarize(run)
    report.print_summary(summary)
    for path in options.export:
        report.export(run, path, summary=summary)
    print(f"report: {report.write_report(run, options.directory, summary=summary)}")
    return 0


def _judge(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.cli_evaluate import judge

    return judge(options, _load(options, Console(stderr=True)))


def _assess(options: argparse.Namespace) -> int:
    from decoding.cli_evaluate import assess

    return assess(options)


def _calibrate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from decoding.backends.local import LocalBackend
    from decoding.calibrate import calibrate
    from decoding.errors import InvalidRequest

    console = Console()
    backend = _load(options, console)
    if not isinstance(backend, LocalBackend):
        raise InvalidRequest("a server's steps cannot be measured from here; leave --base-url out.")
    with console.status("measuring steps; nothing else should run"):
        result = calibrate(backend)
    console.print(result.table())
    if options.plot is not None:
        result.plot(options.plot)
        console.print(f"plot: {options.plot}")
    return 0


def _models(_: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from decoding.models import aliases

    table = Table(box=None, pad_edge=False)
    for column in ("model", "", "where"):
        table.add_column(column, overflow="fold")
    for alias in aliases():
        paths = alias.paths
        table.add_row(
            alias.name,
            alias.description,
            f"not installed: {alias.install}" if paths is None else str(paths[0]),
        )
    Console().print(table)
    print("Any local folder in Hugging Face's layout, .gguf file or hub id (owner/name) works too.")
    return 0
