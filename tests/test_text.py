import os
from collections import Counter
from pathlib import Path

import pytest

from feats.errors import UsageError
from feats.text import CLEAN_LEVELS, clean, clean_with_key, decode_texts

REAL = Path(os.environ.get("MVSA_SINGLE", Path(__file__).parents[2] / "shared" / "mvsa_single"))
CHINESE = ["今天天气很好，我们去公园玩吧", "这个电影真的太好看了！"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", ("", "utf-8")),
        (b"plain", ("plain", "utf-8")),
        ("naïve 😀".encode(), ("naïve 😀", "utf-8")),
        (b"\xef\xbb\xbfmarked", ("marked", "utf-8-sig")),
        ("né".encode("utf-16"), ("né", "utf-16")),
        (b"\xfe\xff" + "né".encode("utf-16-be"), ("né", "utf-16")),
        ("né".encode("utf-32"), ("né", "utf-32")),
        (b"\0\0\xfe\xff" + "né".encode("utf-32-be"), ("né", "utf-32")),
        (b"\xff\xfeh", (None, "has the byte order mark of utf-16 but is not utf-16")),
        (b"a\0b", (None, "NUL bytes: a binary file")),
        (b"\xef\xbb\xbfa\0b", (None, "NUL bytes: a binary file")),
        (b"\x81", (None, "not text in any known encoding")),
    ],
)
def test_one_text(raw, expected):
    assert decode_texts([raw]) == [expected]


@pytest.mark.parametrize(
    ("texts", "encoding"),
    [
        (CHINESE, "gb18030"),
        (["café society", "It’s déjà vu"], "cp1252"),
        (["Сегодня прекрасная погода, идем гулять в парк", "Да"], "cp1251"),
        (["今日はとてもいい天気ですね", "ありがとうございます"], "cp932"),
    ],
)
def test_sets_of_one_encoding(texts, encoding):
    assert decode_texts([text.encode(encoding) for text in texts]) == [(text, encoding) for text in texts]


def test_mixed_set_keeps_order_and_tells_files_apart():
    texts = [(CHINESE[0], "gb18030"), ("plain", "utf-8"), ("café society", "cp1252"), (CHINESE[1], "gb18030")]
    assert decode_texts([text.encode(encoding) for text, encoding in texts]) == texts


def test_ambiguous_text_takes_the_encoding_of_the_set():
    opening_quote = '“this is all yours" has arrived'.encode("gb18030")  # cp1252 reads it as "¡°this ..."
    assert decode_texts([opening_quote])[0][1] == "cp1252"
    texts = decode_texts([opening_quote, *(text.encode("gb18030") for text in CHINESE)])
    assert texts[0] == ('“this is all yours" has arrived', "gb18030")


def test_no_text():
    assert decode_texts([]) == []


def test_real_data_is_utf8_and_gb18030():
    if not REAL.is_dir():
        pytest.skip("the MVSA-Single data set is not here; set MVSA_SINGLE to its folder")
    raws = [path.read_bytes() for path in (REAL / "data").glob("*.txt")]
    texts = decode_texts(raws)
    counts = Counter(encoding for _, encoding in texts)
    assert set(counts) == {"utf-8", "gb18030"}
    assert counts["gb18030"] == sum(not _is_utf8(raw) for raw in raws) > 1000
    assert all(text.encode(encoding) == raw for (text, encoding), raw in zip(texts, raws, strict=True))


def _is_utf8(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  two\r\nlines \t and\u2028more\u00a0 ", "two lines and more"),
        ("cafÃ© and itâ€™s", "café and it's"),
        ("&lt;3 <3 &amp;amp; &#33;", "<3 <3 & !"),
        ("I\u200b am\u00ad \x07here\ufeff", "I am here"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("family 👨\u200d👩\u200d👧 love ❤\ufe0f wow!? #Yes", "family 👨\u200d👩\u200d👧 love ❤\ufe0f wow!? #Yes"),
        ("RT @a: see http://t.co/x", "RT @a: see http://t.co/x"),
        ("", ""),
    ],
)
def test_basic(text, expected):
    assert clean(text, "basic") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so good http://t.co/N8aBcD1234", "so good"),
        ("see https://example.com/a?b=c#d now", "see now"),
        ("see www.example.com/a_b, then", "see , then"),
        ("t.co/abc bare", "bare"),
        ("wow http://t.co/abc!", "wow !"),
        ("http://t.co/abc#fun", "#fun"),
        ("http://t.co/abchttp://t.co/def both", "both"),
        ("cut http://t.co/N8… here", "cut here"),
        ("cut http://t.co/N8...", "cut"),
        ("cut https://t.…", "cut"),
        ("cut http:/…", "cut"),
        ("cut http…", "cut"),
        ("cut htt…", "cut"),
        ("cut h…", "cut"),
        ("cut http", "cut"),
        ("not cut…", "not cut…"),
        ("RT @someone: hello", "hello"),
        ("RT @a: RT @b: hi @c!", "hi !"),
        ("so true! RT @a hello", "so true! hello"),
        ("RT if you agree", "if you agree"),
        ("START the ART of #RT", "START the ART of #RT"),
        (".@user thanks, @other_1: ok", "thanks, ok"),
        ("mail me@example.com @ home", "mail me@example.com @ home"),
        ("😀 #Happy!! really??", "😀 #Happy!! really??"),
        ("RT @a: http://t.co/x @b", ""),
    ],
)
def test_tweet(text, expected):
    assert clean(text, "tweet") == expected


def test_none_only_strips():
    assert clean(" RT @a:  &amp;\nhttp://t.co/x \n", "none") == "RT @a:  &amp;\nhttp://t.co/x"


@pytest.mark.parametrize("level", CLEAN_LEVELS)
@pytest.mark.parametrize(
    "unit", ["a", "@", "http://", "http://!!", "www.", "RT ", "RT:", "&amp;", "Ã©", "\u200d", "\n", " ", "h", "ht…"]
)
def test_cleaning_is_idempotent_and_linear_on_long_texts(level, unit):
    once = clean(unit * (200_000 // len(unit)), level)  # a quadratic pattern would take minutes here
    assert clean(once, level) == once


def test_unknown_level():
    with pytest.raises(UsageError, match="'hard'; there are none, basic, tweet"):
        clean("x", "hard")


@pytest.mark.parametrize("level", CLEAN_LEVELS)
def test_keys_group_retweets(level):
    text = "RT @a: So Happy! http://t.co/abc"
    cleaned, key = clean_with_key(text, level)
    assert cleaned == clean(text, level)
    assert key == clean_with_key("so happy!  http://t.co/xyz…", level)[1] == "so happy!"
    assert key != clean_with_key("so happy?", level)[1]
