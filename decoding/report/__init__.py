"""Records of a run, the statistics made from them, and the reports people read.

with RecordWriter(directory, RunHeader.create(config, environment())) as writer:
    writer.append(AnswerRecord.of(generation, ...))
run = read_run(directory)
summary = summarize(run)
print_summary(summary)
write_report(run, directory)
"""

from decoding.report.compared import RunComparison, compare_runs
from decoding.report.environment import Environment, environment
from decoding.report.export import (
    EXPORTS,
    comparison_markdown,
    export,
    export_comparison,
    flat_rows,
    markdown,
    write_csv,
    write_parquet,
)
from decoding.report.fastchat import write_fastchat
from decoding.report.header import SCHEMA, RunHeader, config_hash
from decoding.report.html import write_comparison, write_report
from decoding.report.records import BASELINE, AnswerRecord, PartRecord
from decoding.report.redaction import Json
from decoding.report.runfile import RecordWriter, Run, read_run, run_directory
from decoding.report.summary import StrategySummary, Summary, summarize
from decoding.report.terminal import comparison_table, print_comparison, print_summary, summary_table

__all__ = [
    "BASELINE",
    "EXPORTS",
    "SCHEMA",
    "AnswerRecord",
    "Environment",
    "Json",
    "PartRecord",
    "RecordWriter",
    "Run",
    "RunComparison",
    "RunHeader",
    "StrategySummary",
    "Summary",
    "compare_runs",
    "comparison_markdown",
    "comparison_table",
    "config_hash",
    "environment",
    "export",
    "export_comparison",
    "flat_rows",
    "markdown",
    "print_comparison",
    "print_summary",
    "read_run",
    "run_directory",
    "summarize",
    "summary_table",
    "write_comparison",
    "write_csv",
    "write_fastchat",
    "write_parquet",
    "write_report",
]
