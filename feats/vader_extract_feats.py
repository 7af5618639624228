"""Score texts with VADER (pos, neu, neg, compound) into saved/feats/vader_<split>.h5."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from feats.cli import extraction_parser, run


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    return extraction_parser("vader", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return run("vader", build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
