"""Bytes -> str, whatever their encoding, and the cleaning of tweets. Nothing is ever dropped or replaced unseen."""

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import ftfy
from charset_normalizer import from_bytes
from ftfy import fixes

from feats.errors import UsageError

CLEAN_LEVELS = ("none", "basic", "tweet")

# The longer marks first: the UTF-32 LE mark begins with the UTF-16 LE one.
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What the MVSA release and its like hold beside UTF-8. The first wins where a text looks as good in both and no
# other text tells; the library, asked openly about one tweet, answers with any of a dozen exotic code pages.
_CANDIDATES = ("cp1252", "gb18030")
_MIN_EVIDENCE = 16  # non-ASCII bytes from which the library's open answer (Cyrillic, Japanese, ...) is believed
_SAMPLE_BYTES = 1 << 20  # enough for it to tell the set's main encoding


def decode_texts(raws: Sequence[bytes]) -> list[tuple[str | None, str]]:
    """Decode a set of texts: one `(text, encoding)` each, or `(None, reason)` for one that can't be decoded.

    Byte order mark, then strict UTF-8 (ASCII counts as it), then detection. One tweet is too short to tell apart
    encodings in which it decodes equally well, so an ambiguous text takes the encoding that is most common among
    the set's unambiguous ones: pass all texts of a data set in one call.
    """
    decoded = [_decode_certain(raw) for raw in raws]
    pending = [i for i, result in enumerate(decoded) if result is None]
    for i, result in zip(pending, _detect([raws[i] for i in pending]), strict=True):
        decoded[i] = result
    return decoded  # type: ignore[return-value]  # no None is left


def _decode_certain(raw: bytes) -> tuple[str | None, str] | None:
    """What needs no guess: texts with a byte order mark, UTF-8, and binary files. None: needs detection."""
    for bom, encoding in _BOMS:
        if raw.startswith(bom):
            text = _strict(raw, encoding)
            if text is None:
                return None, f"has the byte order mark of {encoding} but is not {encoding}"
            return (None, "NUL bytes: a binary file") if encoding == "utf-8-sig" and "\0" in text else (text, encoding)
    if b"\0" in raw:
        return None, "NUL bytes: a binary file"
    text = _strict(raw, "utf-8")
    return None if text is None else (text, "utf-8")


def _detect(raws: Sequence[bytes]) -> list[tuple[str | None, str]]:
    """Detect the encodings of texts that are not Unicode, each in the light of all."""
    guess = _open_guess(_sample(raws))
    candidates = list(dict.fromkeys([*_CANDIDATES, *guess]))
    plausible = [_plausible(raw, candidates) for raw in raws]
    votes = Counter(name for names in plausible if len(names) == 1 for name in names)
    return [_choose(raw, names, candidates, votes) for raw, names in zip(raws, plausible, strict=True)]


def _sample(raws: Sequence[bytes]) -> bytes:
    chunks, size = [], 0
    for raw in raws:
        if size > _SAMPLE_BYTES:
            break
        chunks.append(raw[:_SAMPLE_BYTES])
        size += len(raw)
    return b"\n".join(chunks)


def _open_guess(raw: bytes) -> list[str]:
    """The library's best answer among all encodings, or nothing where the evidence is too thin."""
    if sum(byte > 127 for byte in raw) < _MIN_EVIDENCE:
        return []
    best = from_bytes(raw, preemptive_behaviour=False).best()
    return [] if best is None else [best.encoding]


def _plausible(raw: bytes, candidates: list[str]) -> dict[str, float]:
    """The candidates in which the text decodes and looks like writing, with their share of mess.

    Of candidates that decode the text to the same string only the first is named.
    """
    matches = from_bytes(raw, cp_isolation=candidates, preemptive_behaviour=False)
    return {min(match.could_be_from_charset, key=candidates.index): round(match.chaos, 2) for match in matches}


def _choose(
    raw: bytes, plausible: dict[str, float], candidates: list[str], votes: Counter[str]
) -> tuple[str | None, str]:
    ranked = sorted(plausible, key=lambda name: (-votes[name], plausible[name], candidates.index(name)))
    ranked += sorted(candidates, key=lambda name: -votes[name])  # for a text that looks odd in every one
    for name in ranked:
        text = _strict(raw, name)
        if text is not None:
            return text, name
    for name in _open_guess(raw):
        text = _strict(raw, name)
        if text is not None:
            return text, name
    return None, "not text in any known encoding"


def _strict(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


_BLANKS = re.compile(r"\s+")
_LINE_BREAKS = re.compile(r"\n[ \t\r\n]*")
# Invisible formatting: soft hyphen, zero-width space, direction marks, word joiner, stray byte order marks, ...
# A zero-width (non-)joiner is kept between two non-ASCII characters only: there it joins emoji or shapes a script.
_SHAPED = r"[^\x00-\x7f\s\u200c\u200d]"
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    rf"\ufeff\ufff9-\ufffb]|(?<!{_SHAPED})[\u200c\u200d]+|[\u200c\u200d]+(?!{_SHAPED})"
)
# ftfy's defaults, but entities are unescaped also where a "<" makes it take the text for HTML: tweets say "<3".
# Its straight quotes and half-width forms stay: negations ("don't") and "!" are what lexicons and tokenizers know.
_FTFY = ftfy.TextFixerConfig(unescape_html=True, explain=False)
_SHORT = 512  # characters of a text whose chains ftfy follows to the end in a fraction of a second
_MOST_ROUNDS = 8
_FIXERS = (  # in ftfy's order
    "fix_c1_controls",
    "fix_latin_ligatures",
    "fix_character_width",
    "uncurl_quotes",
    "fix_line_breaks",
    "fix_surrogates",
    "remove_terminal_escapes",
    "remove_control_chars",
)
MAX_MARKS = 30
_MAYBE_MARKS = re.compile(rf"[^\x00-\u02ff]{{{MAX_MARKS + 1},}}")  # all marks lie above
_TWO_MARKS = "\u0f73\u0f75\u0f81"  # no marks, but normalisation makes each two of them

_USER = r"(?<![A-Za-z0-9_])@[A-Za-z0-9_]+"
_RETWEET = re.compile(rf"(?i:\bRT)[\s:]*{_USER}\s*:?|\bRT\s*:")
_LEADING_RETWEET = re.compile(r"^(?:RT\b[\s:]*)+")
_MENTION = re.compile(rf"(?:(?<!\S)\.)?{_USER}:?")  # with the dot of ".@user" and the colon of a quoted "@user: ..."
# t.co codes are letters and digits, so what is glued to one (a hashtag, a second URL, "!") is not part of it.
# Other URLs may hold any ASCII or Latin character, but do not end in punctuation, other than an ellipsis: a cut one.
_URL = re.compile(
    r"""(?:https?://|\b)t\.co/ (?:(?!https?:)[a-z0-9])* (?:…|\.{3})?
      | (?:https?://|\bwww\.) (?:(?:(?!https?://)[!-~À-ɏ])*[\w/=\#&%~+$@-])? (?:\.?…|\.{3})?""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
# What the 140-character limit left of a last URL: "http:/…", "htt…", "h…", or a bare "http".
_CUT_URL = re.compile(r"(?:(?<!\S)ht{0,2}|https?:?/{0,2})\s?(?:…|\.{3})$|(?<!\S)https?:?/{0,2}$")


def clean(text: str, level: str) -> str:
    """Clean a text; `level` is one of `CLEAN_LEVELS`, anything else raises `UsageError`.

    Of a run of marks the first `MAX_MARKS` stay. none: stripped. basic: mojibake repaired, HTML entities unescaped,
    control and zero-width characters removed, any run of blanks and line breaks made one space. tweet: basic, and URLs
    (cut ones too), @user mentions and retweet markers removed. Emoji, hashtags, `!` and `?` survive every level.
    """
    _check_level(level)
    if level == "none":
        return _marks_bounded(text).strip()
    text = _repaired(text)
    return _without_twitter(text) if level == "tweet" else text


def clean_with_key(text: str, level: str) -> tuple[str, str]:
    """`clean(text, level)`, and what texts share that count as duplicates: their tweet-cleaned text, case folded."""
    _check_level(level)
    basic = _repaired(text)
    tweet = _without_twitter(basic)
    return {"none": _marks_bounded(text).strip(), "basic": basic, "tweet": tweet}[level], tweet.casefold()


def _check_level(level: str) -> None:
    if level not in CLEAN_LEVELS:
        raise UsageError(f"unknown cleaning level {level!r}; there are {', '.join(CLEAN_LEVELS)}")


def _repaired(text: str) -> str:
    text = _LINE_BREAKS.sub(" ", text)  # ftfy works line by line, slowly; other blanks may be parts of mojibake
    return _one_line(_INVISIBLE.sub("", fix_text(text, _FTFY)))


def fix_text(text: str, config: ftfy.TextFixerConfig) -> str:
    """`ftfy.fix_text`, in time that grows with the text's length rather than its square.

    The library repeats its repairs until nothing changes: once for each link of a chain such as "&amp;amp;amp;" or
    "ÂÂÂ©". Here they end after `_MOST_ROUNDS`, and runs of marks after `MAX_MARKS`; only such texts come out otherwise.
    """
    text = _marks_bounded(text)
    if len(text) <= _SHORT:
        return ftfy.fix_text(text, config)
    fixed = []
    for line in text.splitlines(keepends=True) if "\n" in text else [text]:
        for low in range(0, len(line), config.max_decode_length):
            segment = line[low : low + config.max_decode_length]
            if config.unescape_html == "auto" and "<" in segment:
                config = config._replace(unescape_html=False)
            fixed.append(_fixed_segment(segment, config))
    return "".join(fixed)


def _fixed_segment(text: str, config: ftfy.TextFixerConfig) -> str:
    """The rounds of `ftfy.fix_and_explain`."""
    for _ in range(_MOST_ROUNDS):
        before = text
        if config.unescape_html:
            text = fixes.unescape_html(text)
        text, more = _decoded_anew(text, config)
        for name in _FIXERS:
            if getattr(config, name):
                text = getattr(fixes, name)(text)
        if config.normalization is not None:
            text = unicodedata.normalize(config.normalization, _marks_bounded(text))
        if more or text == before:
            break
    return text


def _decoded_anew(text: str, config: ftfy.TextFixerConfig) -> tuple[str, bool]:
    """What `ftfy.fix_encoding` makes in `_MOST_ROUNDS` steps, and whether it would go on."""
    for _ in range(_MOST_ROUNDS):
        before = text
        text = ftfy._fix_encoding_one_step_and_explain(text, config).text
        if text == before:
            return text, False
    return text, True


def _marks_bounded(text: str) -> str:
    """A text of which no run of marks is longer than Unicode's stream-safe format allows (UAX #15, D4), the others left
    out: to put a run in its canonical order takes the square of its length."""
    return text if text.isascii() else _MAYBE_MARKS.sub(_run_bounded, text)


def _run_bounded(found: re.Match[str]) -> str:
    kept, marks = [], 0
    for character in found[0]:
        marks = marks + 1 if unicodedata.combining(character) or character in _TWO_MARKS else 0
        if marks <= MAX_MARKS:
            kept.append(character)
    return "".join(kept)


def _one_line(text: str) -> str:
    return _BLANKS.sub(" ", text).strip()


def _without_twitter(text: str) -> str:
    for pattern in (_RETWEET, _MENTION, _URL):
        text = pattern.sub(" ", text)
    return _one_line(_CUT_URL.sub("", _LEADING_RETWEET.sub("", _one_line(text))))
