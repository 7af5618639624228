"""Write a small, synthetic sample of image-text pairs (layout course) to try the pipeline on.

The texts are made from templates and word lists, the pictures are drawn: nothing is taken from real data, and what a
model reaches here says nothing about real tweets. Either side shows the pair's label only often, so that a classifier
needs both and still errs. The labels of the unlabelled part are in test_labels.csv.
"""

import csv
import json
import math
import os
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from feats.errors import UsageError
from feats.terminal import written_out

VERSION = 1  # of what a seed gives
SHARES = {"positive": 0.55, "neutral": 0.15, "negative": 0.30}
TEXT_TELLS, PICTURE_TELLS = 0.8, 0.7  # how often a side shows the pair's own label
MIN_ROWS = 20  # fewer hold too few neutral pairs to split
SIDE = 224
JPEG_QUALITY = 85

Colour = tuple[int, int, int]


# -- command line -----------------------------------------------------------------------------------------------


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=ArgumentDefaultsHelpFormatter,
        epilog="Exit status: 0 the sample is there; 2 unusable arguments, or the folder holds something else.",
    )
    parser.add_argument("--out", type=Path, default=Path("data/sample"), metavar="DIR", help="where to write it")
    parser.add_argument("--n", type=int, default=480, help="labelled pairs")
    parser.add_argument("--n-test", type=int, default=80, metavar="N", help="pairs without label")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same sample")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        written = make_sample(args.out, args.n, args.n_test, args.seed)
        pairs = f"{args.n} labelled and {args.n_test} unlabelled synthetic pairs (seed {args.seed})"
        with written_out():
            print(f"{args.out}: {'wrote' if written else 'nothing to do, there are already'} {pairs}", flush=True)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_sample(folder: Path | str, n: int = 480, n_test: int = 80, seed: int = 0) -> bool:
    """Write `n` labelled and `n_test` unlabelled pairs to `folder`; returns False where that very sample already is.

    The folder appears only when it is whole. Raises `UsageError` for numbers that make no sample, a folder that holds
    anything else, and one that can't be written.
    """
    folder = Path(folder)
    if n < MIN_ROWS or n_test < 1 or seed < 0:
        raise UsageError(f"n {n}, n-test {n_test}, seed {seed}: expected at least {MIN_ROWS}, 1 and 0")
    settings = {"synthetic": True, "version": VERSION, "seed": seed, "n": n, "n_test": n_test}
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            _check_same(folder, settings)
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
            whole = Path(unfinished) / "sample"
            _write(whole, settings)
            os.replace(whole, folder)
    except OSError as error:
        raise UsageError(f"{folder} can't be written ({error.strerror}); give another folder with --out") from None
    return True


def _check_same(folder: Path, settings: dict[str, object]) -> None:
    """Raise `UsageError` unless `folder` holds the sample of these settings."""
    try:
        there = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"{folder} exists and holds no sample of this script; expected a new or empty folder: give one with --out"
        ) from None
    if there != settings:
        raise UsageError(
            f"{folder} holds another sample ({json.dumps(there)}) than the asked one ({json.dumps(settings)}); remove "
            "it, or give another folder with --out"
        )


def _write(folder: Path, settings: dict[str, object]) -> None:
    seed, n, n_test = settings["seed"], settings["n"], settings["n_test"]
    (folder / "data").mkdir(parents=True)
    train = [(str(k + 1), label) for k, label in enumerate(_labels(n, Random(f"{seed}/train")))]
    test = [(str(n + k + 1), label) for k, label in enumerate(_labels(n_test, Random(f"{seed}/test")))]
    for guid, label in train + test:
        r = Random(f"{seed}/{guid}")
        text = tweet(_shown(label, TEXT_TELLS, r), r)
        (folder / "data" / f"{guid}.txt").write_text(text + "\n", encoding="utf-8")
        picture(_shown(label, PICTURE_TELLS, r), r).save(folder / "data" / f"{guid}.jpg", quality=JPEG_QUALITY)
    for name, rows in (
        ("train.txt", train),
        ("test_without_label.txt", [(guid, "null") for guid, _ in test]),
        ("test_labels.csv", test),
    ):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("guid", "tag"), *rows])
    (folder / "sample.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _labels(n: int, r: Random) -> list[str]:
    """n labels in the classes' shares, shuffled; what rounding leaves over goes to the first class."""
    labels = [label for label, share in SHARES.items() for _ in range(int(share * n))]
    labels = [next(iter(SHARES))] * (n - len(labels)) + labels
    r.shuffle(labels)
    return labels


def _shown(label: str, tells: float, r: Random) -> str:
    """What one side of a pair shows: its label, or else rather nothing (neutral) than the contrary."""
    if r.random() < tells:
        return label
    if label == "neutral":
        return r.choice(["positive", "negative"])
    return "neutral" if r.random() < 0.7 else {"positive": "negative", "negative": "positive"}[label]


# -- texts ------------------------------------------------------------------------------------------------------

TOPICS = """the new coffee place|our bus ride|the match|this phone update|the concert|my exam|the office move|the street
market|my haircut|the film|our train trip|the pizza on Main Street|the flat viewing|my first 10k run|the museum|this
book|our garden|the family dinner|the hotel|the queue at the bakery|the swimming lesson|the bike repair|my new laptop|
the school play|the boat tour|this playlist|the parking downtown|the job interview|the flight|the neighbours'
party""".replace("\n", " ").split("|")
SENTENCES = {
    "positive": """{topic} was {word}|so {feeling} after {topic}|{topic} made my day|can't stop smiling, {topic} was
{word}|thank you @{user} for {topic}, {word}|best part of the week: {topic}|{topic} turned out better than I thought|I
would do {topic} again any time|{feeling} and a bit tired after {topic}|not bad at all, {topic}|finally {topic}, and it
is {word}|we laughed so much at {topic}""",
    "negative": """{topic} was {word}|so {feeling} after {topic}|{topic} ruined my day|can't believe it, {topic}
was|@{user} please explain, {topic} was {word}|worst part of the week: {topic}|{topic} could have gone better|I won't do
{topic} again|{feeling} and tired after {topic}|not good at all, {topic}|still waiting, {topic} is {word}|we left early,
{topic} was too much""",
    "neutral": """{topic} starts at {hour} on {day}|@{user} shared the plan for {topic}|photo: {topic}, {day}, {hour}|
update on {topic}: next date is {day}|{number} people signed up for {topic}|does anyone know when {topic} opens?|{topic}
moves to {day}, says @{user}|notes on {topic}, part {number}|here is {topic} as seen at {hour}|{topic} and how it works,
a thread|seen on {day}: {topic}|list of things to bring for {topic}""",
}
SENTENCES = {cue: sentences.replace("\n", " ").split("|") for cue, sentences in SENTENCES.items()}
WORDS = {
    "positive": "wonderful|lovely|great|so much fun|amazing|really nice|better than ever|beautiful|perfect|a pleasure",
    "negative": "awful|terrible|a mess|so boring|a disaster|really sad|worse than ever|ugly|broken|a waste of time",
}
FEELINGS = {"positive": "happy|proud|grateful|excited|relaxed", "negative": "sad|angry|annoyed|worried|let down"}
ENDINGS = {"positive": "!|!!| :)|...|", "neutral": ".||.|", "negative": "!|...| :(|.|"}
HASHTAGS = {
    "positive": "#happy|#love|#goodtimes|#smile|#blessed|#win",
    "neutral": "#news|#city|#photo|#info|#monday|#today",
    "negative": "#fail|#sad|#angry|#tired|#ugh|#nope",
}
EMOJI = {"positive": "😀|😍|🎉|☀️|❤️", "neutral": "📷|📍|🕐|🤔|📊", "negative": "😢|😡|💔|🌧️|😞"}
USERS = "anna|ben_k|citybus|dora99|emil|news_desk|the_fox|yuki"
HOURS = "7 am|9:30|noon|3 pm|6 pm|8:15 pm"
DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"


def tweet(cue: str, r: Random) -> str:
    """One line of text that sounds like `cue`, a class; hashtags and emoji are, now and then, of another."""
    words = {
        "topic": r.choice(TOPICS),
        "word": _pick(WORDS.get(cue, ""), r),
        "feeling": _pick(FEELINGS.get(cue, ""), r),
        "user": _pick(USERS, r),
        "hour": _pick(HOURS, r),
        "day": _pick(DAYS, r),
        "number": r.randint(2, 90),
    }
    sentence = r.choice(SENTENCES[cue]).format(**words)
    if r.random() < 0.6:
        sentence = sentence[0].upper() + sentence[1:]
    parts = [sentence + _pick(ENDINGS[cue], r)]
    for extras, share in ((EMOJI, 0.35), (HASHTAGS, 0.5), (HASHTAGS, 0.2)):
        if r.random() < share:
            parts.append(_pick(extras[cue if r.random() < 0.7 else r.choice(list(SHARES))], r))
    if r.random() < 0.15:
        parts.append(f"http://t.co/{r.getrandbits(40):010x}")
    if r.random() < 0.1:
        parts.insert(0, f"RT @{_pick(USERS, r)}:")
    return " ".join(parts)


def _pick(words: str, r: Random) -> str:
    return r.choice(words.split("|"))


# -- pictures ---------------------------------------------------------------------------------------------------
# Drawn at twice the size and halved: Pillow's shapes have hard edges.

FULL = 2 * SIDE
BRIGHT = [(226, 62, 62), (250, 164, 40), (250, 214, 60), (92, 184, 92), (70, 140, 230), (236, 110, 170)]
DULL = [(96, 88, 84), (110, 104, 92), (74, 82, 96), (120, 110, 110)]
PLAIN = [(150, 150, 156), (176, 168, 152), (128, 146, 160), (190, 186, 178)]


def picture(cue: str, r: Random) -> Image.Image:
    """A drawn scene that looks like `cue`, a class: RGB, SIDE x SIDE, in light, framing and grain of its own."""
    scene = r.choice(SCENES[cue])(r)
    scene = scene.rotate(r.uniform(-8, 8))
    edge = r.randint(30, 70)  # the smallest leaves out the corners that turning left black
    scene = scene.resize((SIDE, SIDE), Image.Resampling.BOX, (edge, edge, FULL - edge, FULL - edge))
    light = r.uniform(0.75, 1.15) * np.array([r.uniform(0.93, 1.07) for _ in range(3)])
    grain = np.random.default_rng(r.getrandbits(64)).standard_normal((SIDE, SIDE, 1), np.float32) * r.uniform(2, 12)
    return Image.fromarray((np.asarray(scene) * light.astype(np.float32) + grain).clip(0, 255).astype(np.uint8))


def _sunny(r: Random) -> Image.Image:
    image, draw = _sky((90, 170, 240), (255, 226, 170), r)
    x, y, size = r.uniform(90, 360), r.uniform(80, 170), r.uniform(28, 56)
    for k in range(12):
        angle = k * math.pi / 6
        tip = (x + 1.8 * size * math.cos(angle), y + 1.8 * size * math.sin(angle))
        draw.line([(x, y), tip], (255, 220, 90), 7)
    _disc(draw, x, y, size, (255, 206, 50))
    for _ in range(3):
        _disc(draw, r.uniform(0, FULL), r.uniform(560, 620), r.uniform(230, 300), _near((96, 176, 80), r))
    for _ in range(r.randint(5, 25)):
        _disc(draw, r.uniform(0, FULL), r.uniform(340, FULL), r.uniform(5, 11), r.choice(BRIGHT))
    return image


def _balloons(r: Random) -> Image.Image:
    image, draw = _sky((150, 205, 250), (255, 240, 222), r)
    for _ in range(r.randint(3, 8)):
        x, y, size = r.uniform(60, 390), r.uniform(70, 280), r.uniform(26, 52)
        draw.line([(x, y), (x + r.uniform(-30, 30), y + 4 * size)], (120, 110, 110), 3)
        draw.ellipse([x - size, y - 1.25 * size, x + size, y + 1.25 * size], r.choice(BRIGHT))
    return image


def _smile(r: Random) -> Image.Image:
    image, draw = _sky((255, 236, 200), (250, 208, 214), r)
    _face(draw, (252, 212, 70), r, smiling=True)
    return image


def _cake(r: Random) -> Image.Image:
    image, draw = _sky((255, 228, 214), (252, 204, 170), r)
    left, top, layers = r.uniform(90, 140), r.uniform(190, 230), r.randint(2, 3)
    for k in range(layers):
        draw.rectangle([left, top + 55 * k, FULL - left, top + 55 * k + 50], r.choice(BRIGHT))
    for k in range(r.randint(3, 6)):
        x = left + 30 + 38 * k
        draw.rectangle([x, top - 50, x + 9, top], r.choice(BRIGHT))
        _disc(draw, x + 4, top - 60, 9, (255, 190, 40))
    return image


def _rain(r: Random) -> Image.Image:
    image, draw = _sky((58, 66, 80), (112, 118, 126), r)
    for _ in range(r.randint(5, 9)):
        _disc(draw, r.uniform(0, FULL), r.uniform(30, 110), r.uniform(40, 80), _near((74, 80, 92), r))
    slant = r.uniform(-25, 25)
    for _ in range(r.randint(60, 160)):
        x, y = r.uniform(0, FULL), r.uniform(100, FULL)
        draw.line([(x, y), (x + slant, y + 40)], (160, 176, 196), 3)
    return image


def _broken(r: Random) -> Image.Image:
    image, draw = _sky(r.choice(DULL), r.choice(DULL), r)
    draw.rectangle([90, 70, 360, 380], _near((150, 158, 164), r), (52, 48, 46), 12)
    x, y = r.uniform(150, 300), r.uniform(130, 320)
    for k in range(r.randint(9, 14)):
        points, angle, way = [(x, y)], k * 0.6 + r.uniform(-0.2, 0.2), 0.0
        while way < 190:
            way += r.uniform(30, 60)
            bent = angle + r.uniform(-0.2, 0.2)
            points.append((x + way * math.cos(bent), y + way * math.sin(bent)))
        draw.line(points, (24, 24, 28), 4)
    return image


def _night(r: Random) -> Image.Image:
    image, draw = _sky((16, 18, 34), (46, 42, 52), r)
    draw.rectangle([0, 370, FULL, FULL], (30, 28, 30))
    _branch(draw, r.uniform(120, 330), 380, -math.pi / 2, r.uniform(80, 110), r)
    if r.random() < 0.6:
        x = r.choice([60, 390])
        draw.line([(x, 380), (x, 150)], (20, 20, 22), 9)
        _disc(draw, x, 145, 16, (150, 128, 80))
    return image


def _frown(r: Random) -> Image.Image:
    image, draw = _sky((92, 98, 112), (60, 62, 74), r)
    _face(draw, (122, 146, 176), r, smiling=False)
    return image


def _chart(r: Random) -> Image.Image:
    image, draw = _sky((246, 246, 244), (236, 238, 240), r)
    for y in range(110, 380, 45):
        draw.line([(80, y), (380, y)], (208, 208, 210), 2)
    colour = _near((90, 120, 160), r)
    for k in range(r.randint(4, 7)):
        draw.rectangle([96 + 42 * k, r.uniform(110, 330), 122 + 42 * k, 370], colour)
    draw.line([(80, 90), (80, 372), (384, 372)], (60, 60, 64), 5)
    return image


def _buildings(r: Random) -> Image.Image:
    image, draw = _sky((196, 206, 214), (220, 222, 222), r)
    x = -20.0
    while x < FULL:
        wide, top = r.uniform(70, 120), r.uniform(90, 240)
        draw.rectangle([x, top, x + wide, FULL], _near(r.choice(PLAIN), r))
        for left in range(int(x) + 12, int(x + wide) - 18, 26):
            for y in range(int(top) + 14, FULL, 36):
                draw.rectangle([left, y, left + 12, y + 18], (92, 102, 114))
        x += wide + r.uniform(0, 12)
    return image


def _mug(r: Random) -> Image.Image:
    image, draw = _sky((222, 218, 210), (206, 200, 190), r)
    draw.rectangle([0, 310, FULL, FULL], _near((170, 148, 122), r))
    colour, x, wide = _near(r.choice(PLAIN), r), r.uniform(120, 230), r.uniform(90, 130)
    draw.ellipse([x + wide - 30, 210, x + wide + 50, 300], None, colour, 14)
    draw.rectangle([x, 180, x + wide, 345], colour)
    draw.ellipse([x, 164, x + wide, 196], (94, 84, 78))
    return image


def _page(r: Random) -> Image.Image:
    image, draw = _sky((150, 146, 140), (166, 162, 156), r)
    draw.rectangle([95, 60, 355, 400], (248, 248, 244))
    for y in range(95, 380, r.choice([18, 22, 28])):
        draw.line([(120, y), (r.uniform(240, 330), y)], (90, 90, 94), 5)
    return image


SCENES = {
    "positive": [_sunny, _balloons, _smile, _cake],
    "neutral": [_chart, _buildings, _mug, _page],
    "negative": [_rain, _broken, _night, _frown],
}


def _sky(top: Colour, bottom: Colour, r: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A canvas that goes from one colour, more or less, to another."""
    ramp = np.linspace(_near(top, r), _near(bottom, r), FULL).astype(np.uint8)  # (FULL, 3)
    image = Image.fromarray(ramp[:, None]).resize((FULL, FULL), Image.Resampling.NEAREST)
    return image, ImageDraw.Draw(image)


def _near(colour: Colour, r: Random) -> Colour:
    return tuple(min(255, max(0, value + r.randint(-22, 22))) for value in colour)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: Colour) -> None:
    draw.ellipse([x - size, y - size, x + size, y + size], colour)


def _face(draw: ImageDraw.ImageDraw, colour: Colour, r: Random, *, smiling: bool) -> None:
    x, y, size = r.uniform(190, 260), r.uniform(190, 260), r.uniform(90, 140)
    _disc(draw, x, y, size, _near(colour, r))
    for side in (-1, 1):
        _disc(draw, x + side * 0.36 * size, y - 0.25 * size, 0.1 * size, (40, 34, 34))
    drop, start = (0.0, 20) if smiling else (0.6 * size, 200)
    mouth = [x - 0.5 * size, y - 0.35 * size + drop, x + 0.5 * size, y + 0.55 * size + drop]
    draw.arc(mouth, start, start + 140, (40, 34, 34), 10)


def _branch(draw: ImageDraw.ImageDraw, x: float, y: float, angle: float, size: float, r: Random) -> None:
    """A bare tree."""
    if size < 14:
        return
    tip = (x + size * math.cos(angle), y + size * math.sin(angle))
    draw.line([(x, y), tip], (10, 10, 12), max(2, int(size / 9)))
    for turn in (-0.5, 0.4):
        _branch(draw, *tip, angle + turn + r.uniform(-0.2, 0.2), size * r.uniform(0.6, 0.75), r)


if __name__ == "__main__":
    sys.exit(main())
