"""Encode texts with all-MiniLM-L6-v2, weights from its Python package, into saved/feats/minilm_<split>.h5."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from feats.extraction.local import extraction_parser, run


def build_parser() -> ArgumentParser:
    return extraction_parser("minilm", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    return run("minilm", build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
