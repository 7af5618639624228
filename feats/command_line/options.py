"""Options that scripts share, and types of arguments."""

import math
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from pathlib import Path


def data_place(text: str) -> Path | str:
    """An argument that is a path, or a URL, which stays a string."""
    from feats.reading.remote import is_url

    return text if is_url(text) else Path(text)


def add_columns_option(group: ArgumentParser | _ArgumentGroup, default: str = "by usual names") -> None:
    """Which columns of a table are ours; `columns_from` reads it. `default` says which else."""
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        dest="table_columns",  # an encoder has a setting of that name
        metavar="OURS=YOURS",
        help="which columns of a table are image, text, label, id and split, e.g. text=title label=category; "
        f"label= for none (default: {default})",
    )


def columns_from(args: Namespace) -> dict[str, str]:
    """What was typed for `add_columns_option`. Raises `UsageError`."""
    from feats.reading.columns import parse_columns

    return parse_columns(args.table_columns)


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def amount(text: str) -> float:
    """An argument that is a finite number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse shows it: "invalid positive integer value: '0'"
amount.__name__ = "amount"
