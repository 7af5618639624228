"""Encode texts with a Hugging Face text encoder into saved/feats/roberta_<split>.h5."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from feats.extraction.local import extraction_parser, run


def build_parser() -> ArgumentParser:
    return extraction_parser("roberta", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    return run("roberta", build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
