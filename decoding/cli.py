"""The command line: `decoding --help` lists the commands."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from decoding import cli_commands
from decoding.cli_options import model_options, sampling_options, schedule_options
from decoding.errors import DecodingError
from decoding.options import DEFAULT_STRATEGIES


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after one sentence on standard error that says what is wrong."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that its encoding lacks is no reason to lose an answer
        sys.stdout.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = command_line(arguments).parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    return exit_code(lambda: options.run(options), f"decoding {options.command}")


def exit_code(run: Callable[[], int | None], name: str = "") -> int:
    """What `run` returns, 0 for nothing, or 2 after one sentence on standard error that says what is wrong.

    name: of what is run, for that sentence; the script's if left out.
    """
    try:
        return run() or 0
    except DecodingError as error:
        print(f"{name or Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; there is nobody to tell
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        return 130


def command_line(arguments: Sequence[str] | None) -> argparse.ArgumentParser:
    """The parser of all commands; the catalogue of strategies is made only if `arguments` ask for help."""
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

    generate = command(
        "generate", "answer one prompt, streaming it to the terminal", cli_commands.run_generate, catalogue
    )
    generate.add_argument("prompt", help="the question; - reads it from standard input")
    generate.add_argument("--strategy", default="autoregressive", help="strategy, in text form")
    model_options(generate)
    sampling_options(generate)
    generate.add_argument("--metrics", action="store_true", help="print the metrics on standard error afterwards")

    compare = command(
        "compare", "answer questions with several strategies, side by side", cli_commands.run_compare, catalogue
    )
    compare.add_argument("questions", nargs="?", default="default", help="a question file or a shipped suite")
    compare.add_argument("--config", metavar="FILE", help="a run file, or a shipped one's name; options override it")
    compare.add_argument(
        "--strategies",
        nargs="+",
        default=list(DEFAULT_STRATEGIES),
        metavar="STRATEGY",
        help="strategies, in text form; 'autoregressive' is the baseline",
    )
    compare.add_argument("--limit", type=int, help="only the first N questions")
    compare.add_argument("--categories", nargs="+", metavar="CATEGORY", help="only these categories")
    compare.add_argument("--output", type=Path, help="run directory (runs/DATE-TIME)")
    compare.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR, configured as it was")
    schedule_options(compare)
    model_options(compare)
    sampling_options(compare)
    compare.add_argument("--ignore-eos", action="store_true", help="answers of full length, for measurements")

    def again(defaults: dict[str, object]) -> argparse.Namespace:
        """The same command line once more, over other defaults: those of a run file."""
        compare.set_defaults(**defaults)
        return parser.parse_args(arguments)

    compare.set_defaults(again=again)

    race = command(
        "race",
        "let strategies answer one question, and watch the answers grow side by side",
        cli_commands.run_race,
        catalogue,
    )
    race.add_argument("prompt", help="the question; - reads it from standard input")
    race.add_argument(
        "--strategies", nargs="+", default=["autoregressive", "speculative", "jacobi"], metavar="STRATEGY"
    )
    race.add_argument("--speed", type=float, default=1.0, help="of the replay; 2 is twice as fast (%(default)s)")
    model_options(race)
    sampling_options(race)

    film = command(
        "film", "answer one prompt, and show what every iteration's block held", cli_commands.run_film, catalogue
    )
    film.add_argument("prompt", help="the question; - reads it from standard input")
    film.add_argument("--strategy", default="jacobi", help="strategy, in text form (%(default)s)")
    film.add_argument("--output", type=Path, metavar="FILE", help="also write the film as an HTML page")
    model_options(film)
    sampling_options(film)

    report = command(
        "report", "make the table and the HTML page of a run again, or compare two runs", cli_commands.run_report
    )
    report.add_argument("directory", type=Path, help="run directory")
    report.add_argument("other", type=Path, nargs="?", help="another run, to compare with")
    report.add_argument(
        "--export",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="also as .csv, .parquet, .md, or a folder of FastChat's",
    )

    judge = command(
        "judge", "let a model compare a run's answers with plain decoding's, in both orders", cli_commands.run_judge
    )
    judge.add_argument("directory", type=Path, help="run directory; the verdicts are added to it")
    judge.add_argument("--strategies", nargs="+", metavar="STRATEGY", help="only these (all that change the answer)")
    judge.add_argument("--prompt", default="pair", help="a template under prompts/judge (%(default)s)")
    judge.add_argument("--templates", metavar="DIR", help="a folder whose templates go before the shipped ones")
    judge.add_argument("--max-new-tokens", type=int, default=512, help="of a judgment (%(default)s)")
    model_options(judge)

    assess = command("assess", "say about a run's answers what can be said without a judge", cli_commands.run_assess)
    assess.add_argument("directory", type=Path, help="run directory; the figures are added to it")
    assess.add_argument("--similarity", action="store_true", help="in meaning, to plain decoding's answer")
    assess.add_argument("--encoder", metavar="DIR", help="a sentence encoder instead of the extra's")
    assess.add_argument("--perplexity", metavar="MODEL", help="of the answers under this local model")

    calibrate = command(
        "calibrate", "measure what a step costs on this machine; widths are chosen by it", cli_commands.run_calibrate
    )
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help="draw it as SVG, with the roofline's floors")
    model_options(calibrate)

    command("models", "list the models that can be named, and where they are", cli_commands.run_models)
    return parser


def _catalogue() -> str:
    """Every strategy, drafter and model, for `--help`."""
    from decoding import catalogue
    from decoding.models import aliases

    def lines(title: str, rows: Sequence[tuple[str, str]]) -> str:
        width = max(len(name) for name, _ in rows)
        return title + "\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)

    return "\n\n".join(
        [
            lines("strategies:", catalogue.strategies()),
            lines("drafters, for speculative(drafter=...):", catalogue.drafters()),
            lines("commit policies, for block-diffusion(policy=...):", catalogue.policies()),
            lines("models:", [(a.name, a.description) for a in aliases()]),
            "Options go in parentheses and may nest: 'skeleton(inner=speculative(drafter=prompt-lookup))'.",
        ]
    )
