"""Odd strings, values and bytes, drawn from a random generator."""

import struct
from random import Random
from typing import Any

from tests.fuzzing.outcomes import CANARY

PICKLE = f"cos\nsystem\n(S'touch ../{CANARY}'\ntR.".encode()
ODD_TEXTS = [
    *("", " ", "a", "null", "NaN", "None", "1", "1.0", "-0.0", "1e400", "true", "9" * 5000, "0", "\x00", "\ud800"),
    *("\x1b[2J\x1b]0;x\x07", "\u202egnp.exe", "\ufeff", "\u200d\ufe0f", "a\u0301\u0316" * 40, "\U0010ffff", "\u2028"),
    *(
        "../bait.txt",
        "/etc/passwd",
        "..",
        ".",
        "~",
        "a/../../bait.txt",
        "x" * 300 + ".txt",
        "C:\\x",
        "http://x.invalid/a",
    ),
    *(
        '"',
        '""',
        '"a',
        "'",
        ",",
        ";",
        "\t",
        "|",
        "\r",
        "\n",
        "\r\n",
        "\\",
        "a\x0bb",
        "\x85",
        "=1+1",
        "@SUM(A1)",
        "-1+1",
    ),
    *("{{7*7}}", "${x}", "%s%n", "<script>", f"$(touch {CANARY})", f"`touch {CANARY}`", "&amp;" * 50, "&#x110000;"),
    *(
        "train",
        "test",
        "val",
        "id",
        "image",
        "text",
        "label",
        "split",
        "RT @a: http://t.co/x…",
        "😂👩‍👩‍👧",
        "ﬁ",
        "Ã¼Ã©",
    ),
]
INTERESTING = [0, 1, -1, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]


def odd_text(rng: Random, most: int = 4) -> str:
    """A few odd pieces, joined."""
    pieces = rng.choices(ODD_TEXTS, k=rng.randint(0, most))
    return "".join(
        piece if rng.random() < 0.8 else chr(rng.choice((rng.randrange(128), rng.randrange(0x110000))))
        for piece in pieces
    )


def without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def plain_text(rng: Random) -> str:
    return " ".join(rng.choices(["good", "bad", "day", "né", "好", "a,b", 'say "x"', "#x", ":)"], k=rng.randint(1, 6)))


def odd_value(rng: Random, depth: int = 2) -> Any:
    """What JSON can hold, and then some."""
    draw = rng.randrange(10)
    if draw < 4:
        return odd_text(rng)
    if draw < 7:
        return rng.choice([None, True, False, 0, -1, 1.0, 1e308, float("nan"), float("inf"), 10**30, 10**4000, 0.1])
    if not depth:
        return []
    if draw < 9:
        return [odd_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {odd_text(rng, 2): odd_value(rng, depth - 1) for _ in range(rng.randint(0, 3))}


def mutated(rng: Random, data: bytes, most: int = 4) -> bytes:
    """Bytes with a few changes: flips, numbers of note, cuts, copies, a piece of something else."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(out) + 1)
        change = rng.randrange(8)
        if change == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif change == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif change == 2:
            number = rng.choice(INTERESTING)
            size = rng.choice((1, 2, 4))
            out[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, rng.choice(("big", "little")))
        elif change == 3:
            del out[at:]
        elif change == 4:
            del out[at : at + rng.randint(1, 64)]
        elif change == 5:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.randint(1, 256)] * rng.choice((1, 1, 2, 30))
        elif change == 6:
            out[at:at] = rng.choice(
                (PICKLE, bytes(rng.randint(1, 600)), b"\xff" * rng.randint(1, 30), rng.randbytes(rng.randint(1, 60)))
            )
        else:
            out[at:at] = odd_text(rng).encode("utf-8", "surrogatepass")
    return bytes(out)


def encoded(rng: Random, text: str) -> bytes:
    """A text as some program may have written it."""
    name = rng.choice(
        ["utf-8"] * 20
        + ["utf-8-sig", "utf-16", "utf-32", "gb18030", "cp1252", "latin-1", "shift_jis", "utf-16-le", "koi8-r"]
    )
    return text.encode(name, "surrogatepass" if name.startswith("utf") else "replace")


def number(rng: Random, size: int, order: str = ">") -> bytes:
    """A field of a header."""
    value = rng.choice(INTERESTING) % (1 << 8 * size)
    return struct.pack(order + {1: "B", 2: "H", 4: "I"}[size], value)
