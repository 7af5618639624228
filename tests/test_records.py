import csv
import io
import json
import os
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from feats.errors import UsageError
from feats.reading.rows import MAX_TEXT_BYTES
from feats.records import Record, TarSlice, read_dataset

REAL = Path(os.environ.get("MVSA_SINGLE", Path(__file__).parents[2] / "shared" / "mvsa_single"))
JPG = b"not looked at"


def write(folder, files):
    """Files by relative name; str is written as UTF-8 without newline translation."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def pairs(folder, *ids):
    return {f"{folder}{i}.{kind}": content for i in ids for kind, content in (("jpg", JPG), ("txt", f"text {i}"))}


def tar(path, members, kind="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# -- course


@pytest.mark.parametrize("folder", ["data/", "pics_texts_pair/", ""])
def test_course(tmp_path, folder):
    lists = {"train.txt": "guid,tag\n2,positive\n1,null\n", "test_without_label.txt": "guid,tag\n3,null\n"}
    write(tmp_path, lists | pairs(folder, 1, 2, 3))
    data = read_dataset(tmp_path)
    assert data.layout == "course" and data.warnings == []
    place = tmp_path / folder
    assert data.splits == {
        "train": [
            Record("2", place / "2.jpg", "text 2", "positive", "utf-8"),
            Record("1", place / "1.jpg", "text 1", None, "utf-8"),
        ],
        "test": [Record("3", place / "3.jpg", "text 3", None, "utf-8")],
    }


@pytest.mark.parametrize(
    "content",
    [
        "guid,tag\n1,good\n2,bad\n",
        "1,good\n2,bad",
        "\ufeffguid,tag\r\n1,good\r\n\r\n2,bad\r\n",
        "GUID , Tag\n\n 1 , good \n2,\tbad\n\n",
        "guid,tag\r1,good\r2,bad\r",
    ],
)
def test_course_list_in_many_hands(tmp_path, content):
    write(tmp_path, {"train.txt": content} | pairs("data/", 1, 2))
    records = read_dataset(tmp_path).splits["train"]
    assert [(record.id, record.label, record.text) for record in records] == [
        ("1", "good", "text 1"),
        ("2", "bad", "text 2"),
    ]


def test_course_test_split_alone_without_tags(tmp_path):
    write(tmp_path, {"test_without_label.txt": "guid\n1\n2\n"} | pairs("data/", 1, 2))
    assert [r.id for r in read_dataset(tmp_path).splits["test"]] == ["1", "2"]


def test_course_list_without_rows_is_warned_about(tmp_path):
    write(tmp_path, {"train.txt": "guid,tag\n1,a\n", "test_without_label.txt": "guid,tag\n"} | pairs("data/", 1))
    data = read_dataset(tmp_path)
    assert list(data.splits) == ["train"]
    assert data.warnings == ["test_without_label.txt holds no rows"]


def test_pictures_of_any_extension_first_wins(tmp_path):
    ids = "train.txt", "guid,tag\na,x\nb.c,x\nD,x\ne,x\n"
    names = ("a.png", "a.JPG", "a.webp", "b.c.gif", "D.jpeg", "d.jpg", "e.svg")
    write(tmp_path, dict([ids]) | {f"data/{name}": JPG for name in names})
    images = [record.image_path for record in read_dataset(tmp_path).splits["train"]]
    folder = tmp_path / "data"
    assert images == [folder / "a.JPG", folder / "b.c.gif", folder / "D.jpeg", None]


def test_ids_never_leave_the_folder(tmp_path):
    write(tmp_path, {"secret.txt": "s", "secret.jpg": JPG, "set/data/sub/x.txt": "s", "set/data/sub/x.jpg": JPG})
    write(tmp_path / "set", {"train.txt": f"guid,tag\n../../secret,a\nsub/x,a\n{tmp_path}/secret,a\n"})
    records = read_dataset(tmp_path / "set").splits["train"]
    assert [(record.image_path, record.text) for record in records] == [(None, None)] * 3
    assert records[1].text_error == "no text file sub/x.txt in data"


def test_odd_text_files_are_rows_with_a_reason(tmp_path):
    ids = ["missing", "folder", "loop", "pipe", "binary", "long", "odd id é", "utf16"]
    write(tmp_path, {"train.txt": "guid,tag\n" + "".join(f"{i},x\n" for i in ids)})
    data = tmp_path / "data"
    write(data, {"binary.txt": b"a\0b", "odd id é.txt": "here", "utf16.txt": "né".encode("utf-16"), "folder.txt/x": ""})
    (data / "loop.txt").symlink_to(data / "loop.txt")
    os.mkfifo(data / "pipe.txt")
    with (data / "long.txt").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    records = {record.id: record for record in read_dataset(tmp_path).splits["train"]}
    assert {i: record.text_error for i, record in records.items()} == {
        "missing": "no text file missing.txt in data",
        "folder": "text folder.txt is a folder",
        "loop": "text loop.txt cannot be read: Too many levels of symbolic links",
        "pipe": "text pipe.txt is not a regular file",
        "binary": "text cannot be decoded: NUL bytes: a binary file",
        "long": "text is longer than 16 MB",
        "odd id é": "",
        "utf16": "",
    }
    assert (records["odd id é"].text, records["utf16"].text, records["utf16"].encoding) == ("here", "né", "utf-16")
    assert {i for i, record in records.items() if record.text is None} == set(ids[:6])


def test_texts_share_their_evidence(tmp_path):
    ambiguous, chinese = '“this is all yours" has arrived', "今天天气很好，我们去公园玩吧"
    write(tmp_path, {"train.txt": "guid,tag\n1,a\n", "test_without_label.txt": "guid,tag\n2,null\n"})
    write(tmp_path / "data", {"1.txt": ambiguous.encode("gb18030"), "2.txt": chinese.encode("gb18030")})
    splits = read_dataset(tmp_path).splits
    assert (splits["train"][0].text, splits["train"][0].encoding) == (ambiguous, "gb18030")


def test_real_data():
    if not REAL.is_dir():
        pytest.skip("the MVSA-Single data set is not here; set MVSA_SINGLE to its folder")
    data = read_dataset(REAL)
    assert {split: len(records) for split, records in data.splits.items()} == {"train": 4000, "test": 511}
    records = [record for split in data.splits.values() for record in split]
    assert Counter(record.label for record in records) == {
        "positive": 2388,
        "negative": 1193,
        "neutral": 419,
        None: 511,
    }
    assert all(record.text is not None and record.image_path.is_file() for record in records)
    assert data.warnings == []


# -- mvsa


def test_mvsa_single_rule(tmp_path):
    polar = {"positive,negative": None, "negative,positive": None}
    expected = polar | {"positive,neutral": "positive", "neutral,negative": "negative", "neutral,neutral": "neutral"}
    expected |= {"positive,positive": "positive", "negative,neutral": "negative", "Neutral,Positive ": "positive"}
    expected |= {"postive,neutral": None}
    rows = "".join(f"{i}\t{labels}\r\n" for i, labels in enumerate(expected, 1))
    write(tmp_path, {"labelResultAll.txt": "ID\ttext,image\r\n" + rows} | pairs("data/", *range(1, 10)))
    data = read_dataset(tmp_path)
    assert data.layout == "mvsa"
    labels = {record.id: record.label for record in data.splits["train"]}
    assert labels == {str(i): label for i, label in enumerate(expected.values(), 1) if label}
    assert data.splits["train"][0].text == "text 3"
    assert data.warnings == [
        "2 of 9 pairs dropped: text and image labels contradict (positive against negative)",
        "1 of 9 pairs dropped: their labels are not pairs of negative, neutral, positive",
    ]


def test_mvsa_multiple_takes_majorities_first(tmp_path):
    rows = {
        # text: positive twice; image: neutral twice
        "positive,neutral\tpositive,neutral\tnegative,negative": "positive",
        # text: neutral; image: negative
        "neutral,negative\tneutral,negative\tpositive,positive": "negative",
        # text: no majority
        "positive,neutral\tneutral,neutral\tnegative,neutral": None,
        # image: no majority
        "neutral,positive\tneutral,neutral\tneutral,negative": None,
        # text: positive; image: negative
        "positive,negative\tpositive,negative\tneutral,neutral": None,
        "neutral,neutral\tneutral,neutral\tneutral,neutral": "neutral",
    }
    lines = "".join(f"{i}\t{cells}\n" for i, cells in enumerate(rows, 1))
    write(tmp_path, {"labelResultAll.txt": "ID\ttext,image\ttext,image\ttext,image\n" + lines})
    write(tmp_path, pairs("data/", *range(1, 7)))
    data = read_dataset(tmp_path)
    assert [record.label for record in data.splits["train"]] == [label for label in rows.values() if label]
    assert data.warnings == [
        "2 of 6 pairs dropped: the annotators have no majority",
        "1 of 6 pairs dropped: text and image labels contradict (positive against negative)",
    ]


# -- manifest

ROWS = [
    {"id": "a b", "image": "pics/1.jpg", "text": 'He said "hi",\nthen left', "label": " good ", "split": "val"},
    {"id": "2", "image": "", "text": "texts/2.txt", "label": "", "split": ""},
    {"id": "3", "image": "missing.png", "text": "see notes.txt", "label": "bad", "split": "train"},
    {"id": "4", "image": "x.png", "text": "gone.txt", "label": "bad", "split": "train"},
]


def manifest_csv(rows, newline="\n"):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def manifest_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


MANIFESTS = {
    "m.csv": manifest_csv(ROWS),
    "M.CSV": "\ufeff" + manifest_csv(ROWS, "\r\n"),
    "m.jsonl": manifest_jsonl(ROWS),
    "n.jsonl": manifest_jsonl(ROWS).replace("\n", "\r\n\r\n"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest(tmp_path, name):
    write(tmp_path, {name: MANIFESTS[name], "pics/1.jpg": JPG, "texts/2.txt": "café society".encode("cp1252")})
    data = read_dataset(tmp_path / name)
    assert data.layout == "manifest"
    assert data.splits == {
        "val": [Record("a b", tmp_path / "pics/1.jpg", 'He said "hi",\nthen left', "good")],
        "train": [
            Record("2", None, "café society", None, "cp1252"),
            Record("3", tmp_path / "missing.png", "see notes.txt", "bad"),
            Record(
                "4",
                tmp_path / "x.png",
                None,
                "bad",
                text_error="text gone.txt cannot be read: No such file or directory",
            ),
        ],
    }


def test_manifest_of_a_folder(tmp_path):
    write(tmp_path, {"some.csv": "id,text\n1,x\n"})
    assert read_dataset(tmp_path).splits == {"train": [Record("1", None, "x")]}
    write(tmp_path, {"other.csv": "id,text\n2,y\n"})
    with pytest.raises(UsageError, match="is none of the known layouts.*other.csv, some.csv"):
        read_dataset(tmp_path)
    with pytest.raises(UsageError, match="must hold one manifest.*found other.csv, some.csv.*`data`"):
        read_dataset(tmp_path, "manifest")
    write(tmp_path, {"manifest.jsonl": '{"id": 3, "text": "z", "label": 1}\n'})
    assert read_dataset(tmp_path).splits == {"train": [Record("3", None, "z", "1")]}


def test_manifest_may_lack_a_side(tmp_path):
    write(tmp_path, {"m.csv": "id,image\n1,a.jpg\n"})
    record = read_dataset(tmp_path / "m.csv").splits["train"][0]
    assert record == Record("1", tmp_path / "a.jpg", None, text_error="the manifest gives no text")


def test_manifest_with_a_megabyte_of_text(tmp_path):
    limit = csv.field_size_limit()
    text = "long " * 200_000
    write(tmp_path, {"m.csv": f"id,text\n1,{text}\n"})
    assert read_dataset(tmp_path / "m.csv").splits["train"][0].text == text
    assert csv.field_size_limit() == limit


def test_jsonl_strings_keep_their_characters(tmp_path):
    write(tmp_path, {"m.jsonl": '{"id": "1", "text": "a\u2028b\\ud83d\\ude00"}\n{"id": "2", "text": "\\ud83d"}\n'})
    records = read_dataset(tmp_path / "m.jsonl").splits["train"]
    assert records[0].text == "a\u2028b😀"
    assert (records[1].text, records[1].text_error) == (None, "text cannot be decoded: it holds a lone surrogate")


# -- shards


def test_shards(tmp_path):
    second = [
        ("./k3.json", json.dumps({"id": "three", "label": 7, "text": "from json", "width": [1]})),
        ("./k3.webp", b"webp!"),
        ("sub/k4.cls", "bad\n"),
        ("sub/k4.seg.png", b"mask"),
        ("sub/.hidden.txt", "x"),
    ]
    tar(tmp_path / "train-001.tar", second)
    tar(tmp_path / "train-000.tar", [("k1.jpg", b"one!"), ("k1.txt", "text 1"), ("k1.cls", "good")])
    tar(tmp_path / "test.tar", [("k2.PNG", b"two"), ("k2.txt", "café".encode("cp1252"))])
    data = read_dataset(tmp_path)
    assert data.layout == "shards"
    first, third, fourth = data.splits["train"]
    assert (first.id, first.text, first.label, first.encoding) == ("k1", "text 1", "good", "utf-8")
    assert (third.id, third.text, third.label, third.encoding) == ("three", "from json", "7", "")
    assert fourth == Record("sub/k4", None, None, "bad", text_error="no text file sub/k4.txt in train-001.tar")
    (second,) = data.splits["test"]
    assert (second.text, second.encoding) == ("café", "cp1252")
    assert [r.image_path.read() for r in (first, second, third)] == [b"one!", b"two", b"webp!"]
    assert isinstance(first.image_path, TarSlice) and first.image_path.name == "k1.jpg"


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-000", "train"), ("val_12", "val"), ("test7", "test"), ("00001", "train"), ("my_set-3", "my_set")],
)
def test_shard_names_give_the_split(tmp_path, name, split):
    path = tar(tmp_path / f"{name}.tar", [("a.txt", "x")])
    assert list(read_dataset(path).splits) == [split]


def test_truncated_tar_at_every_place(tmp_path):
    whole = tar(tmp_path / "whole.tar", [(f"{i}.{kind}", b"x" * 700) for i in range(3) for kind in ("jpg", "txt")])
    content = whole.read_bytes()
    end = 6 * (512 + 1024)  # what follows is padding
    assert len(read_dataset(whole).splits["whole"]) == 3
    cut = tmp_path / "cut.tar"
    for size in range(0, end, 256):
        cut.write_bytes(content[:size])
        with pytest.raises(UsageError, match="cut.tar .*truncated|cut.tar .*no pairs"):
            read_dataset(cut)
    cut.write_bytes(content[:1536] + b"damage" * 20 + content[1656:])
    with pytest.raises(UsageError, match="damaged at byte 1536; make or copy it again"):
        read_dataset(cut)


@pytest.mark.parametrize(("kind", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tar(tmp_path, kind, name):
    for file in ("a.tar", "a.tar.gz"):
        path = tar(tmp_path / file, [("a.txt", "x")], kind)
        with pytest.raises(UsageError, match=f"compressed \\({name}\\); decompress it"):
            read_dataset(path)


# -- what every layout refuses

BAD = {
    "repeated id": ({"m.csv": "id,text\n1,a\n2,b\n1,c\n"}, r"1 repeated ids: '1' \(m.csv line 2 and m.csv line 4\)"),
    "repeated across splits": ({"m.csv": "id,text,split\n1,a,x\n1,b,y\n"}, "repeated id"),
    "empty id": ({"m.csv": "id,text\n1,a\n ,b\n"}, "m.csv line 3: empty id"),
    "NUL in an id": ({"m.jsonl": '{"id": "a\\u0000", "text": "x"}'}, r"m.jsonl line 1: id 'a\\x00'.*NUL"),
    "lone surrogate": ({"m.jsonl": '{"id": "a", "text": "x", "label": "\\ud800"}'}, "lone surrogate"),
    "unknown key": ({"m.jsonl": '{"id": 1, "txt": "a"}'}, "m.jsonl line 1: columns id, txt; expected image or text .*`columns`, e.g. text=id"),
    "column twice": ({"m.csv": "id,text,text\n1,a,b\n"}, "named twice"),
    "no side": ({"m.csv": "id,label\n1,a\n"}, "m.csv: columns id, label; expected image or text among them"),
    "too many cells": ({"m.csv": "id,text\n1,a,b\n"}, "m.csv line 2: 3 cells, expected 2"),
    "open quote": ({"m.csv": 'id,text\n1,"a\n2,b\n'}, "not valid CSV"),
    "split name": ({"m.csv": "id,text,split\n1,a,../x\n"}, "m.csv line 2: split '../x'; expected letters"),
    "broken JSON": ({"m.jsonl": '{"id": 1, "text": "a"}\n{"id": 2,\n'}, "m.jsonl line 2: not valid JSON"),
    "JSON list": ({"m.jsonl": "[1]\n"}, "m.jsonl line 1: a JSON list; expected one object"),
    "nested JSON": ({"m.jsonl": '{"id": 1, "text": ["a"]}\n'}, "m.jsonl line 1: text is a JSON list"),
    "binary manifest": ({"m.csv": b"id,text\n\0"}, "m.csv cannot be decoded: NUL"),
    "empty manifest": ({"m.csv": ""}, "columns none; expected image or text"),
    "manifest without rows": ({"m.csv": "id,text\n\n"}, "holds no pairs"),
    "course columns": ({"train.txt": "guid,tag,age\n1,a,3\n"}, "train.txt line 1: columns guid,tag,age; expected guid,tag"),
    "course label column": ({"train.txt": "guid,label\n1,a\n"}, "columns guid,label; expected guid,tag"),
    "course without rows": ({"train.txt": "guid,tag\n"}, "holds no pairs"),
    "course empty id": ({"train.txt": "guid,tag\n1,a\n,b\n"}, "train.txt line 3: empty id"),
    "course repeated": ({"train.txt": "1,a\n", "test_without_label.txt": "1,null\n"}, "repeated id.*'1'"),
    "mvsa without rows": ({"labelResultAll.txt": "ID\ttext,image\n1\tpositive,negative\n"}, "holds no pairs"),
    "empty folder": ({"data/x": ""}, "none of the known layouts. Found: data. Expected one of: course: .*mvsa: .*shards"),
    "two layouts": ({"train.txt": "1,a\n", "manifest.csv": "id,text\n"}, "looks like course and manifest.*`layout`"),
    "unknown file": ({"x.xlsx": ""}, "none of the known layouts. Found: x.xlsx"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path, case):
    files, message = BAD[case]
    write(tmp_path, files)
    (name,) = list(files)[:1]
    is_file = name.endswith((".csv", ".jsonl", ".xlsx"))
    with pytest.raises(UsageError, match=message) as caught:
        read_dataset(tmp_path / name if is_file else tmp_path)
    assert "\n" not in str(caught.value)


# Lines as an editor counts them, behind blank ones and cells of several lines.
PLACES = {
    "course columns": ("train.txt", "\n\nguid,tag,age\n1,a,3\n", "train.txt line 3: columns guid,tag,age"),
    "course empty id": ("train.txt", "guid,tag\n\n1,a\n\n,b\n", "train.txt line 5: empty id"),
    "course repeated": ("train.txt", "guid,tag\n\n1,a\n2,b\n\n1,c\n", r"'1' \(train.txt line 3 and train.txt line 6\)"),
    "mvsa empty id": (
        "labelResultAll.txt",
        "ID\ttext,image\n\n1\tneutral,neutral\n\tneutral,neutral\n",
        "labelResultAll.txt line 4: empty id",
    ),
    "csv empty id": ("m.csv", 'id,text\n1,"a\nb"\n\n,c\n', "m.csv line 5: empty id"),
    "csv cells": ("m.csv", 'id,text\n1,"a\n\nb"\n2,c,d\n', "m.csv line 5: 3 cells"),
    "csv split": ("m.csv", "id,text,split\n\n1,a,?\n", "m.csv line 3: split"),
    "csv invalid": ("m.csv", 'id,text\n\n1,a\n2,"b"c\n', "m.csv line 4: not valid CSV"),
    "jsonl invalid": ("m.jsonl", '\n{"id": 1, "text": "a"}\n\n{"id": 2,\n', "m.jsonl line 4: not valid JSON"),
    "jsonl list": ("m.jsonl", '{"id": 1, "text": "a"}\n\n[]\n', "m.jsonl line 3: a JSON list"),
    "jsonl key": ("m.jsonl", '{"id": 1, "text": "a"}\n\n{"id": 1, "txt": ""}\n', "m.jsonl line 3: columns id, txt; expected image or text"),
    "jsonl nested": ("m.jsonl", '\n{"id": 1, "text": ["a"]}\n', "m.jsonl line 2: text is a JSON list"),
    "jsonl repeated": ("m.jsonl", '{"id": 1, "text": "a"}\n\n{"id": 1, "text": "b"}\n', "m.jsonl line 1 and m.jsonl line 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_the_place_of_a_fault_is_told(tmp_path, case):
    name, content, message = PLACES[case]
    write(tmp_path, {name: content})
    with pytest.raises(UsageError, match=message):
        read_dataset(tmp_path / name if name.startswith("m.") else tmp_path)


def test_the_place_of_a_fault_in_a_shard_is_told(tmp_path):
    for shard, key in (("train-0.tar", "k1"), ("train-1.tar", "k2")):
        tar(tmp_path / shard, [(f"{key}.txt", "x"), (f"{key}.json", '{"id": "same"}')])
    with pytest.raises(UsageError, match=r"'same' \(train-0.tar k1 and train-1.tar k2\)"):
        read_dataset(tmp_path)


def test_only_five_repeated_ids_are_named(tmp_path):
    write(tmp_path, {"train.txt": "".join(f"{i},a\n" for i in range(8)) * 2})
    with pytest.raises(UsageError, match="8 repeated ids") as caught:
        read_dataset(tmp_path)
    assert str(caught.value).count(" and train.txt") == 5


def test_bad_calls(tmp_path):
    with pytest.raises(UsageError, match="cannot read .*nowhere: No such file or directory; .*`data`"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unknown layout 'coco'; there are course, mvsa, manifest, shards"):
        read_dataset(tmp_path, "coco")
    for layout in ("course", "mvsa", "manifest", "shards"):
        with pytest.raises(UsageError, match=f"layout {layout}|must hold one manifest"):
            read_dataset(tmp_path, layout)


def test_repeated_files_in_a_shard(tmp_path):
    path = tar(tmp_path / "a.tar", [("k.txt", "x"), ("k.txt", "y")])
    with pytest.raises(UsageError, match="a.tar: k.txt is there twice"):
        read_dataset(path)


def test_broken_json_in_a_shard(tmp_path):
    path = tar(tmp_path / "a.tar", [("k.json", "{")])
    with pytest.raises(UsageError, match="a.tar k.json: not valid JSON"):
        read_dataset(path)


# -- labels seen once


@pytest.mark.parametrize(("rows", "warned"), [(99, False), (100, True)])
def test_label_typo_is_warned_about_by_name(tmp_path, rows, warned):
    labels = ["postive", *["positive", "negative"] * 60][:rows]
    write(tmp_path, {"train.txt": "\n\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels))})
    expected = "label 'postive' is seen once among 100 rows (train.txt line 3); is it 'positive'?"
    assert read_dataset(tmp_path).warnings == ([expected] if warned else [])


def test_many_single_labels_are_not_a_flood(tmp_path):
    write(tmp_path, {"train.txt": "".join(f"{i},{chr(0x4E00 + i)}\n" for i in range(150))})
    warnings = read_dataset(tmp_path).warnings
    assert len(warnings) == 11 and warnings[-1] == "140 more labels are seen only once"


@pytest.mark.slow
def test_many_rows_are_linear(tmp_path):
    write(tmp_path, {"m.csv": "id,image,text,label\n" + "".join(f"{i},{i}.jpg,hello {i},a\n" for i in range(100_000))})
    start = time.perf_counter()
    assert len(read_dataset(tmp_path / "m.csv").splits["train"]) == 100_000
    assert time.perf_counter() - start < 30  # about 1 s; quadratic would be hours
