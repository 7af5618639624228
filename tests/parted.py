"""A split encoded at once and in parts, for tests of whatever reads or joins parts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from conftest import make_course

from feats.encoders.base import Encoder, Features, ImageSide, Loading, TextSide, Tokens
from feats.extraction.local import extract
from feats.extraction.plan import make_plan
from feats.extraction.settings import ExtractionSettings
from feats.images import ResizeCrop
from feats.parts import PartsPlan, part_path, parts_folder, plan_path
from feats.records import Pairs, read_dataset

SETTINGS = ExtractionSettings(workers=0, batch_size=2, views=2)  # blocks of 16 rows
ROWS = 70


def both_sides(by_batch: bool = False) -> Encoder:
    """An encoder of both sides with tokens; with `by_batch` values depend on the batch, as real ones' do in their last
    bits."""

    def image(pixels: torch.Tensor) -> Features:
        flat = pixels.mean((2, 3)) + (1e-2 * pixels.mean() if by_batch else 0)
        return {"feats": flat, "tokens": torch.stack([flat, -flat], 1)}

    def text(ids: list[str]) -> Features:
        longest = max(map(len, ids))
        states = torch.tensor([[[ord(c) % 7, float(len(i))] for c in i.ljust(longest)] for i in ids])
        return {"feats": torch.stack([s[: len(i)].mean(0) for s, i in zip(states, ids)]), "tokens": states}

    def tokenize(texts: list[str]) -> list[Tokens]:
        return [Tokens(text[:40] or " ", max(len(text[:40]), 1), len(text) > 40) for text in texts]

    loading = Loading(torch.device("cpu"), torch.float32, True)
    side = ImageSide(ResizeCrop(8, 8, "bilinear"), [0.5] * 3, [0.5] * 3, image)
    encoder = Encoder({"encoder": "both", "model": "tiny"}, loading, side, TextSide(tokenize, text))
    return replace(encoder, text_clean="basic")


def pairs_with_faults(root: Path, rows: int = ROWS) -> Pairs:
    """The labelled pairs of a course set, of which some can't be encoded and one has no label."""
    make_course(root, rows)
    (root / "data" / "3.jpg").write_bytes(b"no picture")
    (root / "data" / "40.txt").unlink()
    (root / "data" / "41.jpg").unlink()
    text = (root / "train.txt").read_text()
    (root / "train.txt").write_text(text.replace("\n5,negative", "\n5,null").replace("\n5,neutral", "\n5,null"))
    return read_dataset(root)["train"]


def make_parts(
    encoder: Encoder, records: Pairs, path: Path, sizes: Sequence[int], settings: ExtractionSettings = SETTINGS
) -> PartsPlan:
    """The parts of the cache at `path`, the pieces of `sizes` rows."""
    plan = make_plan(encoder, records, settings)
    firsts = [sum(sizes[:k]) for k in range(len(sizes))]
    shared = PartsPlan(
        {key: value for key, value in plan.fingerprint.items() if key != "data"},
        plan.kept,
        plan.features,
        records.layout,
        records.split,
        [{"first": first, "rows": rows} for first, rows in zip(firsts, sizes, strict=True)],
    )
    assert sum(sizes) == len(records)
    folder = parts_folder(path)
    folder.mkdir(parents=True)
    plan_path(folder).write_text(shared.text, encoding="utf-8")
    for number, (first, rows) in enumerate(zip(firsts, sizes, strict=True)):
        extract(encoder, records[first : first + rows], part_path(folder, number), settings)
    return shared
