"""Hash the character n-grams of texts into saved/feats/ngrams_<split>.h5."""

if __name__ == "__main__":  # before what takes its time to import
    from feats.interrupts import quiet_start

    quiet_start()

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from feats.cli import extraction_parser, run


def build_parser() -> ArgumentParser:
    """The script's arguments."""
    return extraction_parser("ngrams", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return run("ngrams", build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
