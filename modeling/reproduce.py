"""Reproduce a reference study's published table on whatever caches there are: its heads are trained by its recipe, and
its figures stand beside ours, with intervals and what differs. Without a table: list them."""

from __future__ import annotations

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import feats.threads  # noqa: F401

# isort: split

from feats.command_line.exit_status import EXIT_DONE
from feats.command_line.messages import rows_bar
from feats.command_line.options import positive
from feats.command_line.wording import as_typed
from feats.errors import UsageError
from modeling import choices
from modeling.choices import SEEDS
from modeling.command_line.messages import OPTION_OF, command_line, guarded, training_bar
from modeling.command_line.options import add_data_options, add_run_options, data_place, named_texts, new_parser
from modeling.reproduction.published import TABLES, Row, Table

if TYPE_CHECKING:
    from modeling.reproduction.tables import Result, Settings


ALL = "all"


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    parser = new_parser(__doc__, "python modeling/reproduce.py", "python modeling/reproduce.py all --seeds 5")
    parser.add_argument("table", nargs="?", choices=(*TABLES, ALL), metavar="TABLE", help=f"{', '.join(TABLES)} or all")
    group = parser.add_argument_group("features")
    group.add_argument("--feats", type=Path, default=choices.FEATS, metavar="DIR", help="folder of caches")
    nearest = "(default: row by row the one nearest to the study's encoder)"
    group.add_argument("--vtype", nargs="+", metavar="CACHE", help=f"caches of the image side {nearest}")
    group.add_argument("--ttype", nargs="+", metavar="CACHE", help=f"caches of the text side {nearest}")
    group = parser.add_argument_group("training")
    group.add_argument("--seeds", type=positive, default=SEEDS, metavar="N", help="seeds of each head on caches")
    group.add_argument(
        "--folds", type=positive, metavar="K", help="cross-validate heads on caches in place of the study's one split"
    )
    group.add_argument("--rows", nargs="+", metavar="WORDS", help="only rows whose name holds one of these")
    group = parser.add_argument_group("rows whose encoders the study tuned")
    group.add_argument("--finetune", action="store_true", help="tune them, end to end on the raw pairs")
    add_data_options(group, "the pairs (default: where the caches say, or data)")
    group.add_argument("--weights", nargs="+", default=[], metavar="NAME=PATH", help="weights of an encoder")
    add_run_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    if args.table is None:
        print("\n".join(f"{name:<12}{table.title} ({len(table.rows)} rows)" for name, table in TABLES.items()))
        print(f"{ALL:<12}each of these")
        return EXIT_DONE
    again = "what is finished is kept, run the same command to go on"
    return guarded(lambda: work(args, command_line(argv)), again)


def work(args: Namespace, command: str) -> int:
    """Reproduce one table or all; returns the exit status."""
    from modeling.reproduction.tables import Settings

    tables = list(TABLES.values()) if args.table == ALL else [TABLES[args.table]]
    rows_of = {table.name: chosen_rows(table, args.rows) for table in tables}
    if not any(rows_of.values()):
        names = "; ".join(row.label for table in tables for row in table.rows)
        raise UsageError(f"`rows` {' '.join(args.rows)}: no row is called so; there are {names}")
    image, text = (None if names is None else tuple(names) for names in (args.vtype, args.ttype))
    settings = Settings(args.feats, args.runs, image, text, args.seeds, args.folds, args.device)
    weights = checked_weights(args, [row for rows in rows_of.values() for row in rows])
    lacking = [
        table.name
        for table in tables
        if rows_of[table.name] and not reproduce(table, rows_of[table.name], settings, weights, args, command)
    ]
    made = [table.name for table in tables if rows_of[table.name] and table.name not in lacking]
    if not made:
        raise UsageError(
            f"no row of {', '.join(lacking)} could be trained, for the reasons above; make caches in {args.feats} with "
            "feats/*_extract_feats.py, or name their folder with `feats`"
        )
    if len(tables) > 1:
        print(f"{len(made)} tables ({', '.join(made)}) -> {args.runs}/reproduce_*")
    return EXIT_DONE


def reproduce(
    table: Table, rows: Sequence[Row], settings: Settings, weights: dict[str, str], args: Namespace, command: str
) -> bool:
    """Train what isn't finished of a table, show and write it; returns whether any of its rows has figures."""
    from modeling.reproduction.finetuned import tuned_results
    from modeling.reproduction.tables import compare, frozen_results

    made_by = {"command": command, "options": args.given}
    frozen = frozen_results(table, rows, settings, made_by=made_by, say=print, bar=training_bar)
    tuned = tuned_results(
        table,
        rows,
        settings,
        data_place(args),
        weights,
        train=args.finetune,
        made_by=made_by,
        say=print,
        bar=partial(rows_bar, passing=True),
    )
    results = in_order(rows, [*frozen, *tuned])
    comparison = compare(table, results, settings)
    print(f"\n{as_typed(comparison.text(), OPTION_OF)}\n")
    runs = {path for result in results for path in result.runs}
    if runs:
        comparison.write(settings.folder_of(table))
        made = {path for result in results for path in result.made}
        print(
            f"{len(runs)} runs, {len(made)} of them trained now, table.csv and table.md -> {settings.folder_of(table)}"
        )
    return bool(runs)


def in_order(rows: Sequence[Row], results: Sequence[Result]) -> list[Result]:
    """As the study published its rows; what was made of one row stays together."""
    place = {row.label: k for k, row in enumerate(rows)}
    return sorted(results, key=lambda result: place[result.row.label])


def chosen_rows(table: Table, words: Sequence[str] | None) -> list[Row]:
    """The rows whose label holds one of some words; all without."""
    return [row for row in table.rows if words is None or any(word in row.label for word in words)]


def checked_weights(args: Namespace, rows: Sequence[Row]) -> dict[str, str]:
    """The typed weights by encoder. Raises `UsageError` for an encoder that no tuned row has."""
    from modeling.reproduction.finetuned import encoders_of

    weights = named_texts(args.weights, "--weights")
    known = {choice.name for row in rows if row.model for choice in encoders_of(row)}
    unknown = sorted(weights.keys() - known)
    if unknown:
        raise UsageError(
            f"`weights` names {', '.join(unknown)}; the encoders of tuned rows here are {', '.join(sorted(known))}"
        )
    return weights


if __name__ == "__main__":
    sys.exit(main())
