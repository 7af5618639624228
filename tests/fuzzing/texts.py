"""Texts: decoding of sets of them, cleaning at every level, CSV files that must come back."""

import unicodedata
from pathlib import Path
from random import Random

from feats.csv_files import parse_csv, read_csv, read_table, write_csv, write_table
from feats.errors import UsageError
from feats.text import CLEAN_LEVELS, clean, clean_with_key, decode_texts
from tests.fuzzing.mutations import ODD_TEXTS, encoded, mutated, odd_text, plain_text, without_surrogates
from tests.fuzzing.outcomes import INPUTS, OUTPUTS, Outcome, expect, judged, made


def decoding(rng: Random, folder: Path) -> Outcome:
    """Bytes of every encoding, and of none."""
    made(rng, folder)
    raws = [encoded(rng, odd_text(rng) + plain_text(rng)) for _ in range(rng.randint(1, 4))]
    raws = [mutated(rng, raw) if rng.random() < 0.4 else raw for raw in raws]
    if rng.random() < 0.05:
        raws.append(rng.randbytes(rng.randrange(3000)))

    def act() -> None:
        found = decode_texts(raws)
        expect(len(found) == len(raws), "as many texts as there were")
        for raw, (text, said) in zip(raws, found, strict=True):
            expect(bool(said), "neither an encoding nor a reason")
            expect(text is None or text == raw.decode(said), f"{text!r} isn't {raw!r} as {said}")
        if all(text is None for text, _ in found):
            raise UsageError(found[0][1])

    return judged(folder, act)


def _long_text(rng: Random) -> str:
    piece = rng.choice(
        [
            *ODD_TEXTS,
            odd_text(rng),
            chr(rng.randrange(0x300, 0x1A00)),
            "@a",
            "http",
            "https://",
            "RT ",
            "t.co/",
            "…",
            "&#",
            "\u200d",
            "Ã",
            "â‚¬",
        ]
    )
    return (piece * rng.choice((100, 1000, 20_000)))[:100_000]


def cleaning(rng: Random, folder: Path) -> Outcome:
    """Every level gives what is promised of it, of short texts and of long ones."""
    made(rng, folder)
    text = odd_text(rng, 12)
    if rng.random() < 0.2:
        text = without_surrogates(
            text + _long_text(rng) + odd_text(rng) + (_long_text(rng) if rng.random() < 0.5 else "")
        )

    def act() -> None:
        cleaned = {level: clean(text, level) for level in CLEAN_LEVELS}
        for level in CLEAN_LEVELS:
            expect(clean_with_key(text, level) == (cleaned[level], cleaned["tweet"].casefold()), f"{level} of {text!r}")
        for level in ("basic", "tweet"):
            odd = [c for c in cleaned[level] if unicodedata.category(c) == "Cc"]
            expect(not odd, f"{level} leaves {odd[:5]!r}")
            expect(cleaned[level] == " ".join(cleaned[level].split()), f"{level} leaves blanks: {cleaned[level]!r}")

    return judged(folder, act)


def csv_files(rng: Random, folder: Path) -> Outcome:
    """Rows and tables come back; any bytes are rows, or no UTF-8."""
    home = made(rng, folder)
    width = rng.randint(1, 4)
    rows = [[without_surrogates(odd_text(rng)) for _ in range(width)] for _ in range(rng.randint(0, 5))]
    columns = ["id", "a,b", "\r", " x "]
    table = [
        {name: without_surrogates(odd_text(rng)) for name in rng.sample(columns, 2)} for _ in range(rng.randint(1, 4))
    ]
    (home / "any.csv").write_bytes(mutated(rng, "\n".join(",".join(row) for row in rows).encode()))

    def act() -> None:
        out = folder / OUTPUTS
        write_csv(out / "t.csv", rows)
        expect(read_csv(out / "t.csv") == rows, f"{rows} come back as {read_csv(out / 't.csv')}")
        write_table(out / "u.csv", table)
        names = dict.fromkeys(name for row in table for name in row)
        expect(read_table(out / "u.csv") == [{**dict.fromkeys(names, ""), **row} for row in table], f"{table}")
        path = folder / INPUTS / "any.csv"
        try:
            expect(read_csv(path) == parse_csv(path.read_bytes().decode()), "two readings differ")
            read_table(path)
        except UnicodeDecodeError as error:
            raise UsageError(str(error)) from None

    return judged(folder, act)


TEXTS = {"decoding": decoding, "cleaning": cleaning, "csv-files": csv_files}
