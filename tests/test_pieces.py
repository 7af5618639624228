import csv
import gc
import io
import json
import os
import random
import sys
import tempfile
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from test_records import tar

from feats import cli
from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.extraction.shared import Worker
from feats.pieces import first_rows, open_pieces
from feats.reading import manifests, remote
from feats.reading.shards import expanded
from feats.records import TarSlice, read_dataset
from feats.store import FeatureStore


def shards(folder, splits=("test", "train", "train")):
    """Three shards of two pairs: test-0.tar, train-1.tar, train-2.tar."""
    for n, split in enumerate(splits):
        pairs = [(f"{n}{k}", f"picture {n}{k}", f"text {n}{k}") for k in "ab"]
        members = [m for key, image, text in pairs for m in ((f"{key}.jpg", image), (f"{key}.txt", text))]
        tar(folder / f"{split}-{n}.tar", [*members, (f"{n}a.cls", "good")])
    return folder


def joined(pieces):
    """A split's records, of all pieces in order."""
    return [record for number in range(len(pieces)) for record in pieces.read(number)]


def pictures(records):
    return [record.image_path.read() if isinstance(record.image_path, TarSlice) else None for record in records]


def same(pieces, dataset):
    """Whether pieces and a data set read as a whole hold the same, in the same order."""
    assert list(pieces) == list(dataset.splits)
    for split, whole in dataset.splits.items():
        assert (pieces[split].layout, pieces[split].split) == (dataset.layout, split)
        assert joined(pieces[split]) == whole
        assert [r.text_path for r in joined(pieces[split])] == [r.text_path for r in whole]


# -- manifests

NASTY = [
    'a,"b"', "two\nlines", "back\r\nand forth", "old\rMac", "", "  blanks ", "été 中文 😀", 'quote "" end', "u\u2028sep",
    "ends with \\", "'", "tab\there", "long " * 300,
]  # fmt: skip


def nasty_rows(count, seed=0):
    drawn = random.Random(seed)
    return [
        {
            "id": f"id {i}",
            "image": drawn.choice(["", f"pics/{i}.jpg", "/elsewhere/x.png"]),
            "text": drawn.choice(NASTY),
            "label": drawn.choice(["", "good", " bad "]),
            "split": drawn.choice(["train", "train", "val", ""]),
        }
        for i in range(count)
    ]


def as_csv(rows, end="\n", quoting=csv.QUOTE_MINIMAL):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator=end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=k % 2 == 0) + "\n" for k, row in enumerate(rows))


ROWS = nasty_rows(97)
MANIFESTS = {
    "unix.csv": as_csv(ROWS, quoting=csv.QUOTE_ALL),  # a writer leaves a lone "\r" bare
    "windows.CSV": "\ufeff" + as_csv(ROWS, "\r\n"),
    "mac.csv": as_csv(ROWS, "\r", csv.QUOTE_ALL),
    "blank.csv": "id,text\n\n\n1,a\n\n2,b\n,\n" + "\n" * 5 + '3,"c\n\n\n"\n\n',
    "no_end.csv": "id,text\n1,a\n2,b",
    "rows.jsonl": as_jsonl(ROWS),
    "windows.jsonl": "\ufeff" + as_jsonl(ROWS).replace("\n", "\r\n\r\n"),
    "no_end.jsonl": '{"id": 1, "text": "a"}\n\n{"id": 2, "text": "b"}',
}


@pytest.mark.parametrize("chunk", [7, 1000, 1 << 20])
@pytest.mark.parametrize("rows", [1, 10, 1000])
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_in_pieces_is_the_manifest(tmp_path, monkeypatch, name, rows, chunk):
    monkeypatch.setattr(remote, "CHUNK_BYTES", chunk)
    (tmp_path / name).write_bytes(MANIFESTS[name].replace(",\n,\n", ",\n").replace("b\n,\n", "b\n").encode())
    whole = read_dataset(tmp_path / name)
    pieces = open_pieces(tmp_path / name, rows=rows)
    same(pieces, whole)
    for split in pieces.values():
        told = [split.describe(number) for number in range(len(split))]
        assert [len(split.read(number)) for number in range(len(split))] == [piece["rows"] for piece in told]
        assert [piece["first"] for piece in told] == list(range(0, len(whole[split.split]), rows))
        assert json.loads(json.dumps(told)) == told


def test_pieces_are_read_in_any_order_and_again(tmp_path):
    (tmp_path / "m.jsonl").write_text(as_jsonl(ROWS), encoding="utf-8")
    pieces = open_pieces(tmp_path, rows=8)["train"]
    whole = read_dataset(tmp_path)["train"]
    for number in [3, 0, len(pieces) - 1, 3]:
        assert pieces.read(number) == whole[8 * number : 8 * number + 8]


def test_what_a_manifest_s_piece_knows_of_its_place(tmp_path):
    (tmp_path / "m.csv").write_text(as_csv(ROWS, quoting=csv.QUOTE_ALL), encoding="utf-8", newline="")
    whole, piece = read_dataset(tmp_path)["train"], open_pieces(tmp_path, rows=5)["train"].read(2)
    assert piece.source.images == whole[10:15].source.images
    assert (piece.source.data, piece.source.resolved, piece.source.layout) == (str(tmp_path),) * 2 + ("manifest",)


def test_text_files_tell_their_encoding_within_a_piece(tmp_path):
    ambiguous, chinese = '“this is all yours" has arrived', "今天天气很好，我们去公园玩吧"
    for name, text in (("1.txt", ambiguous), ("2.txt", chinese)):
        (tmp_path / name).write_bytes(text.encode("gb18030"))
    (tmp_path / "m.csv").write_text("id,text\n1,1.txt\n2,2.txt\n")
    assert open_pieces(tmp_path, rows=2)["train"].read(0)[0].encoding == "gb18030"
    assert open_pieces(tmp_path, rows=1)["train"].read(0)[0].encoding == "cp1252"


def test_labels_seen_once_are_warned_about_as_ever(tmp_path):
    rows = "".join(f"{i},x,{'good' if i % 2 else 'bad'}\n" for i in range(120))
    (tmp_path / "m.csv").write_text(f"id,text,label\n{rows}a,x,goood\n")
    with pytest.warns(UserWarning) as caught:
        open_pieces(tmp_path, rows=50)
    assert [str(w.message) for w in caught] == read_dataset(tmp_path).warnings != []


BAD_MANIFESTS = {
    "repeated": ("m.csv", "id,text\n1,a\n2,b\n3,c\n1,d\n", r"1 repeated ids: '1' \(m.csv line 2 and m.csv line 5\)"),
    "repeated in splits": ("m.csv", "id,text,split\n1,a,x\n1,b,y\n", "1 repeated ids"),
    "empty id": ("m.csv", 'id,text\n1,"a\nb"\n\n,c\n', "m.csv line 5: empty id"),
    "cells": ("m.csv", 'id,text\n1,"a\n\nb"\n2,c,d\n', "m.csv line 5: 3 cells"),
    "split": ("m.csv", "id,text,split\n\n1,a,?\n", "m.csv line 3: split"),
    "quote": ("m.csv", 'id,text\n\n1,a\n2,"b"c\n', "m.csv line 4: not valid CSV"),
    "columns": ("m.csv", "id,colour\n1,b\n", "columns id, colour; expected image or text"),
    "nothing": ("m.csv", "", "columns none; expected image or text"),
    "no rows": ("m.csv", "id,text\n\n", "holds no pairs"),
    "json": ("m.jsonl", '\n{"id": 1, "text": "a"}\n\n{"id": 2,\n', "m.jsonl line 4: not valid JSON"),
    "surrogate": ("m.jsonl", '{"id": "a", "text": "x", "label": "\\ud800"}', "m.jsonl line 1: .*lone surrogate"),
    "latin": ("m.csv", "id,text\n1,a\n2,caf\xe9\n".encode("latin-1"), "m.csv line 3 isn't UTF-8; .*piece by piece"),
    "utf-16": ("m.jsonl", '{"id": 1, "text": "a"}\n'.encode("utf-16"), "m.jsonl line 1 isn't UTF-8"),
    "binary": ("m.csv", b"id,text\n1,\0\n", "m.csv cannot be decoded: NUL"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifests(tmp_path, case):
    name, content, message = BAD_MANIFESTS[case]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=message) as caught:
        open_pieces(tmp_path / name, rows=1)
    assert "\n" not in str(caught.value)


def test_equal_hashes_are_no_repeated_ids(tmp_path, monkeypatch):
    (tmp_path / "m.csv").write_text("id,text\n" + "".join(f"{i},a\n" for i in range(20)))
    monkeypatch.setattr(manifests, "hash", lambda text: int(text) % 3, raising=False)
    assert len(open_pieces(tmp_path, rows=7)["train"]) == 3


def test_a_manifest_that_shrank_is_noticed(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("id,text\n" + "".join(f"{i},a\n" for i in range(20)))
    pieces = open_pieces(path, rows=5)["train"]
    path.write_text("id,text\n1,a\n")
    with pytest.raises(UsageError, match="fewer rows than when it was counted"):
        pieces.read(1)
    path.unlink()
    with pytest.raises(UsageError, match="cannot read .*m.csv: No such file"):
        pieces.read(1)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("csv", 20_000), *(pytest.param(kind, 60_000, marks=pytest.mark.slow) for kind in ("csv", "jsonl"))],
)
def test_memory_does_not_grow_with_a_manifest(tmp_path, monkeypatch, kind, most):
    """But for the 8 bytes a row of the ids' hashes, and a few numbers for each piece."""
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1 << 16)
    rows, peaks = {"short": most // 5, "long": most}, {}
    for name, count in rows.items():
        path = tmp_path / f"{name}.{kind}"
        with path.open("w") as file:
            file.write("id,text,label\n" if kind == "csv" else "")
            for i in range(count):
                text = f"quite a happy day {i}"
                file.write(f"{i},{text},good\n" if kind == "csv" else f'{{"id": {i}, "text": "{text}"}}\n')
        gc.collect()
        tracemalloc.start()
        pieces = open_pieces(path, rows=1000)["train"]
        assert sum(len(pieces.read(number)) for number in range(0, len(pieces), len(pieces) // 2)) > 0
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    more = rows["long"] - rows["short"]
    assert peaks["long"] - peaks["short"] < 16 * more  # as a whole some 1,000 bytes a row
    assert peaks["long"] < 6 << 20


# -- shards


def test_shards_in_pieces_are_the_shards(tmp_path):
    shards(tmp_path)
    pieces, whole = open_pieces(tmp_path, rows=1), read_dataset(tmp_path)
    same(pieces, whole)
    assert (
        pictures(joined(pieces["train"]))
        == pictures(whole["train"])
        == [b"picture " + k for k in (b"1a", b"1b", b"2a", b"2b")]
    )
    train = pieces["train"]
    assert [train.describe(n) for n in range(2)] == [{"shard": "train-1.tar"}, {"shard": "train-2.tar"}]
    assert train.read(1).source == whole["train"][2:].source


@pytest.mark.parametrize("what", ["pattern", "choice", "list", "one"])
def test_shards_by_pattern_and_list(tmp_path, what):
    shards(tmp_path / "set")
    (tmp_path / "list.txt").write_text("# mine\n\nset/train-2.tar\n  set/train-1.tar  \n")
    data = {
        "pattern": "set/train-{1..2}.tar",
        "choice": "set/train-{2,1}.tar",
        "list": "list.txt",
        "one": "set/train-1.tar",
    }[what]
    pieces = open_pieces(tmp_path / data, rows=1)
    ids = {"pattern": ["1a", "1b", "2a", "2b"], "one": ["1a", "1b"]}.get(what, ["2a", "2b", "1a", "1b"])
    assert list(pieces) == ["train"] and [r.id for r in joined(pieces["train"])] == ids
    assert pieces["train"].describe(0)["shard"].endswith(f"train-{ids[0][0]}.tar")


def test_a_path_with_braces_that_is_there_is_no_pattern(tmp_path):
    shards(tmp_path / "a{b,c}")
    assert list(open_pieces(tmp_path / "a{b,c}", rows=1)) == ["test", "train"]


def test_patterns():
    assert expanded("s3://b/t-{08..11}.tar") == [f"s3://b/t-{n}.tar" for n in ("08", "09", "10", "11")]
    assert expanded("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expanded("{9..10}") == ["9", "10"] and expanded("x.tar") == ["x.tar"]


BAD_PATTERNS = {
    "t-{3..1}.tar": "ends before it begins",
    "t-{1..3.tar": "braces don't match",
    "t-{1..{2..3}}.tar": "braces don't match",
    "t-{1...3}.tar": "neither a range nor a choice",
    "t-{}.tar": "neither a range nor a choice",
    "t-{0..99999999}.tar": "more than 1000000 shards",
    "{0..9999}-{0..9999}.tar": "more than 1000000 shards",
    "t-{1,1}.tar": "t-1.tar twice",
    f"t-{{0..{'9' * 30}}}.tar": "neither a range nor a choice",
}


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
@pytest.mark.parametrize("folder", ["", "memory://bad/"])
def test_bad_patterns(pattern, folder):
    with pytest.raises(UsageError, match=BAD_PATTERNS[pattern]):
        open_pieces(folder + pattern, rows=1)


def test_patterns_of_more_digits_than_python_reads():
    with pytest.raises(UsageError, match="neither a range nor a choice"):
        expanded(f"memory://bad/t-{{0..{'9' * 5000}}}.tar")


def test_a_list_of_what_no_file_can_be_called(tmp_path):
    (tmp_path / "list.txt").write_bytes("a\0.tar\n".encode("utf-16"))
    with pytest.raises(UsageError, match="list.txt line 1: .* is no tar shard"):
        open_pieces(tmp_path / "list.txt", rows=1)


def test_bad_shards(tmp_path):
    whole = shards(tmp_path) / "train-1.tar"
    pieces = open_pieces(tmp_path, rows=1)["train"]
    whole.write_bytes(whole.read_bytes()[:1700])
    with pytest.raises(UsageError, match=f"{whole} is truncated"):
        pieces.read(0)
    tar(whole, [("a.txt", "x")], "w:gz")
    with pytest.raises(UsageError, match=f"{whole} is compressed \\(gzip\\)"):
        pieces.read(0)
    tar(whole, [])
    with pytest.raises(UsageError, match=f"{whole} .*holds no pairs"):
        pieces.read(0)
    tar(whole, [(f"{k}.json", '{"id": "same"}') for k in "ab"])
    with pytest.raises(UsageError, match=r"'same' \(train-1.tar a and train-1.tar b\)"):
        pieces.read(0)
    whole.unlink()
    with pytest.raises(UsageError, match=f"cannot read {whole}: No such file"):
        pieces.read(0)
    with pytest.raises(UsageError, match="cannot read .*train-1.tar: No such file"):
        open_pieces(tmp_path / "train-{1..2}.tar", rows=1)
    (tmp_path / "list.txt").write_text("train-2.tar\n1,positive\n")
    with pytest.raises(UsageError, match="list.txt line 2: '1,positive' is no tar shard; expected one a line"):
        open_pieces(tmp_path / "list.txt", rows=1)
    with pytest.raises(UsageError, match="cannot read .*nowhere: No such file"):
        open_pieces(tmp_path / "nowhere", rows=1)
    with pytest.raises(UsageError, match="unknown layout 'coco'"):
        open_pieces(tmp_path, "coco", rows=1)


# -- other layouts, and first rows


def test_a_course_is_read_and_cut(tmp_path):
    (tmp_path / "train.txt").write_text("guid,tag\n" + "".join(f"{i},good\n" for i in range(5)))
    (tmp_path / "test_without_label.txt").write_text("guid,tag\n")
    with pytest.warns(UserWarning, match="test_without_label.txt holds no rows"):
        pieces = open_pieces(tmp_path, rows=2)
    same(pieces, read_dataset(tmp_path))
    assert len(pieces["train"]) == 3


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 99])
@pytest.mark.parametrize("kind", ["shards", "manifest"])
def test_first_rows(tmp_path, kind, limit):
    if kind == "shards":
        shards(tmp_path)
    else:
        (tmp_path / "m.csv").write_text("id,text\n" + "".join(f"{i},a\n" for i in range(4)))
    whole = read_dataset(tmp_path)["train"]
    first = first_rows(open_pieces(tmp_path, rows=2)["train"], limit)
    assert joined(first) == whole[:limit] and len(first) == (1 if limit <= 2 else 2)
    assert (first.layout, first.split) == (kind, "train")
    if limit == 3:
        assert first.describe(1)["rows"] == 1
        assert first.describe(0) == open_pieces(tmp_path, rows=2)["train"].describe(0)


# -- at URLs


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, for this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0))


def in_memory(folder, url):
    """Puts a folder's files at memory://<url>/."""
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/{url}/{path.name}", path.read_bytes())
    return f"memory://{url}"


class Server:
    """A local web server of a folder's files. `cuts` answers of each are broken off in the middle; `lengths`, `ranges`:
    whether it tells the one and knows the other; `fails` are paths it answers with a status, and how often."""

    def __init__(self, root, lengths=True, ranges=True):
        self.root, self.lengths, self.ranges = root, lengths, ranges
        self.cuts, self.fails, self.gets = {}, {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(head=True)

            def do_GET(self):
                self.answer(head=False)

            def answer(self, head):
                name = self.path.strip("/").split("?")[0]
                status, times = server.fails.get(name, (0, 0))
                if times > 0 and not head:
                    server.fails[name] = (status, times - 1)
                if times > 0 or (name and not (server.root / name).is_file()):
                    self.send_error(status if times > 0 else 404)
                    return
                links = "".join(f'<a href="{path.name}">x</a>' for path in server.root.iterdir())
                body = (server.root / name).read_bytes() if name else links.encode()
                wanted = self.headers.get("Range") if server.ranges else None
                if wanted:
                    first, last = wanted.removeprefix("bytes=").split("-")
                    body = body[int(first) : int(last) + 1]
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Type", "application/x-tar" if name else "text/html")
                if server.lengths:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if head:
                    return
                server.gets.append(name)
                if server.cuts.get(name, 0) > 0:
                    server.cuts[name] -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_shards_in_memory(tmp_path, temporary):
    whole = read_dataset(shards(tmp_path / "set"))
    url = in_memory(tmp_path / "set", "shards_in_memory")
    pieces = open_pieces(url, rows=1)
    assert list(pieces) == ["test", "train"]
    for split in pieces.values():
        read = [split.read(number) for number in range(len(split))]
        records = [record for piece in read for record in piece]
        assert [(r.id, r.text, r.label) for r in records] == [(r.id, r.text, r.label) for r in whole[split.split]]
        assert pictures(records) == pictures(whole[split.split])
    assert pieces["train"].describe(1) == {"shard": f"{url}/train-2.tar"}


def test_a_copy_lives_as_long_as_its_pairs(tmp_path, temporary):
    shards(tmp_path / "set")
    pieces = open_pieces(in_memory(tmp_path / "set", "copies"), rows=1)["train"]
    pairs = pieces.read(0)
    (folder,) = (path for path in temporary.iterdir() if path.is_dir())
    assert [path.name for path in folder.iterdir()] == ["train-1.tar"]
    first = pairs[:1]
    del pairs
    if os.fork() == 0:  # as a decoding process has it, which ends or forgets it
        del first
        os._exit(0)
    os.wait()
    assert first[0].image_path.read() == b"picture 1a"
    del first
    assert not list(temporary.iterdir())


def test_sources_name_the_url_and_the_member(tmp_path, temporary):
    shards(tmp_path / "set")
    url = in_memory(tmp_path / "set", "sources")
    source = open_pieces(url, rows=1)["train"].read(0)[1:].source
    assert (source.data, source.resolved, source.layout, source.split) == (url, url, "shards", "train")
    assert source.images == [f"{url}/train-1.tar::1b.jpg"] and source.texts == [f"{url}/train-1.tar::1b.txt"]
    (tmp_path / "list.txt").write_text(f"{url}/train-1.tar\nset/train-2.tar\n")
    listed = open_pieces(tmp_path / "list.txt", rows=1)["train"]
    assert listed.read(0).source.images[0] == f"{url}/train-1.tar::1a.jpg"
    assert listed.read(1).source.images[0] == "set/train-2.tar::2a.jpg"


@pytest.mark.parametrize("what", ["folder", "pattern", "list", "one"])
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.slow
def test_shards_over_http(tmp_path, temporary, what, lengths):
    shards(tmp_path / "set")
    (tmp_path / "set" / "list.txt").write_text("train-1.tar\ntrain-2.tar\n")
    with Server(tmp_path / "set", lengths=lengths or what == "list") as server:
        data = {"folder": "/", "pattern": "/train-{1..2}.tar", "list": "/list.txt", "one": "/train-1.tar"}[what]
        pieces = open_pieces(server.url + data, rows=1)
        ids = ["1a", "1b"] if what == "one" else ["1a", "1b", "2a", "2b"]
        assert [record.id for record in joined(pieces["train"])] == ids
        assert pictures(pieces["train"].read(0)) == [b"picture 1a", b"picture 1b"]
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_cut_connection_is_tried_again(tmp_path, temporary):
    shards(tmp_path / "set")
    with Server(tmp_path / "set") as server:
        server.cuts["train-1.tar"] = 3
        server.fails["train-2.tar"] = (503, 2)
        pieces = open_pieces(f"{server.url}/train-{{1..2}}.tar", rows=1)["train"]
        assert pictures(pieces.read(0)) == [b"picture 1a", b"picture 1b"]
        assert server.gets == ["train-1.tar"] * 4
        assert len(pieces.read(1)) == 2


def test_what_goes_on_failing_is_one_line(tmp_path, temporary):
    shards(tmp_path / "set")
    with Server(tmp_path / "set") as server:
        url = f"{server.url}/train-1.tar"
        server.cuts["train-1.tar"] = 99
        pieces = open_pieces(f"{url}?signature=secret", rows=1)["train"]
        with pytest.raises(UsageError, match=f"{url} can't be read: .*tried 4 times.*; check address") as caught:
            pieces.read(0)
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
        server.fails["train-1.tar"] = (403, 99)
        with pytest.raises(UsageError, match=f"{url} can't be read: 403") as caught:
            pieces.read(0)
        assert "tried" not in str(caught.value) and "secret" not in str(caught.value)
        with pytest.raises(UsageError, match=f"{server.url}/gone-1.tar can't be read: there is no such file"):
            open_pieces(f"{server.url}/gone-1.tar", rows=1)["gone"].read(0)
        assert pieces.describe(0) == {"shard": url}
    with pytest.raises(UsageError, match="can't be read: .*tried 4 times"):
        pieces.read(0)
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_shard_that_is_cut_unnoticed_is_truncated(tmp_path, temporary):
    """Without a length nobody can tell a cut connection from an end; a tar can."""
    shards(tmp_path / "set")
    with Server(tmp_path / "set", lengths=False) as server:
        server.cuts["train-1.tar"] = 99
        pieces = open_pieces(f"{server.url}/train-1.tar", rows=1)["train"]
        with pytest.raises(UsageError, match=f"{server.url}/train-1.tar is truncated"):
            pieces.read(0)


@pytest.mark.parametrize("name", ["rows.jsonl", "mac.csv", "windows.CSV"])
@pytest.mark.parametrize("where", ["memory", "http"])
def test_manifests_at_urls(tmp_path, monkeypatch, name, where):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 500)
    rows = [{**row, "image": ""} for row in ROWS]  # one at a URL may name no file
    content = (
        as_jsonl(rows) if name.endswith("jsonl") else as_csv(rows, "\r" if "mac" in name else "\r\n", csv.QUOTE_ALL)
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(content.encode())
    whole = read_dataset(tmp_path / "set" / name)
    with Server(tmp_path / "set") as server:
        url = server.url if where == "http" else in_memory(tmp_path / "set", f"manifests_{name}")
        server.cuts[name] = 2
        pieces = open_pieces(f"{url}/{name}", rows=10)
        same(pieces, whole)
        same(open_pieces(url, "manifest", rows=10), whole)
        source = pieces["train"].read(0).source
    assert source.data == source.resolved == f"{url}/{name}"
    assert source.images == [""] * 10


def test_manifests_at_urls_that_cannot_be_read(tmp_path):
    (tmp_path / "m.csv").write_text("id,image\n1,a.jpg\n" + "2,/b.jpg\n" * 100)
    (tmp_path / "n.csv").write_text("id,text\n1,notes.txt\n")
    for ranges, lengths, why in (
        (False, True, "sends it as a whole only"),
        (True, False, "doesn't tell how long it is"),
    ):
        with Server(tmp_path, lengths, ranges) as server, pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote, "CHUNK_BYTES", 100)
            with pytest.raises(UsageError, match=f"m.csv can't be read piece by piece: the server {why}; copy"):
                open_pieces(f"{server.url}/m.csv", rows=1)
    with Server(tmp_path) as server:
        with pytest.raises(UsageError, match="n.csv line 2: the file 'notes.txt' is named by a manifest at a URL"):
            open_pieces(f"{server.url}/n.csv", rows=1)["train"].read(0)
        with pytest.raises(UsageError, match="must hold one manifest.*found m.csv, n.csv"):
            open_pieces(server.url, rows=1)
        with pytest.raises(UsageError, match="layout course can't be read from a URL"):
            open_pieces(server.url, "course", rows=1)


def test_urls_of_unknown_and_missing_kinds(monkeypatch):
    with pytest.raises(UsageError, match="xyz://a/b.tar can't be read: Protocol not known.*s3://"):
        open_pieces("xyz://a/b.tar", rows=1)["b"].read(0)
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=f"{protocol}:// needs a package.*pip install {package}$"):
            open_pieces(f"{protocol}://bucket/train-0.tar", rows=1)["train"].read(0)
    fsspec.filesystem("memory").pipe_file("/empty/x.png", b"")
    with pytest.raises(UsageError, match="memory://empty holds neither shards nor a manifest"):
        open_pieces("memory://empty", rows=1)
    with pytest.raises(UsageError, match="s3://bucket is a URL, whose data are read piece by piece only"):
        read_dataset("s3://bucket")


def test_no_room_for_a_copy(tmp_path, temporary, monkeypatch):
    shards(tmp_path / "set")
    pieces = open_pieces(in_memory(tmp_path / "set", "no_room"), rows=1)["train"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "get_file", full)
    with pytest.raises(UsageError, match="train-1.tar can't be read: no space left in .*temporary.*TMPDIR"):
        pieces.read(0)


def test_secrets_of_urls_stay_out_of_sight():
    assert remote.public_url("https://me:word@host/a/train-1.tar?sig=x#y") == "https://host/a/train-1.tar"
    assert remote.base_name("s3://bucket/a/train-1.tar?x=/y") == "train-1.tar"
    assert remote.public_url("s3://bucket/a") == "s3://bucket/a"


def test_a_remote_piece_is_encoded_as_a_local_one(tmp_path):
    members = []
    for k in range(5):
        picture = io.BytesIO()
        Image.new("RGB", (8, 6), (40 * k, 10, 200)).save(picture, "PNG")
        members.append((f"{k}.png", picture.getvalue()))
    tar(tmp_path / "set" / "train-0.tar", members)
    url = in_memory(tmp_path / "set", "encoded")
    encoder, settings = load_encoder("pixels"), ExtractionSettings(workers=1)
    extract(encoder, read_dataset(tmp_path / "set")["train"], tmp_path / "local.h5", settings)
    # Not in the folder `temporary`: worker processes have sockets there, and such a path must be short.
    pairs = open_pieces(url, rows=1)["train"].read(0)
    copied = pairs.copied.path
    assert extract(encoder, pairs, tmp_path / "remote.h5", settings).done == 5 and copied.exists()
    del pairs
    assert not copied.parent.exists()
    with FeatureStore.open(tmp_path / "local.h5") as local, FeatureStore.open(tmp_path / "remote.h5") as remote_one:
        assert (local.read("image_feats") == remote_one.read("image_feats")).all()
        assert local.fingerprint == remote_one.fingerprint
        assert list(remote_one.source.images) == [f"{url}/train-0.tar::{k}.png" for k in range(5)]


# -- the command line


def arguments(*words):
    return cli.extraction_parser("minilm", None).parse_args([str(word) for word in words])


def job(*words):
    return cli._job("minilm", arguments(*words), Worker())


def test_urls_stay_whole_and_paths_stay_paths(tmp_path):
    assert arguments("--data", "s3://bucket/a//b").data == "s3://bucket/a//b"
    assert arguments("--data", tmp_path).data == tmp_path and arguments().data == Path("data")
    streams = {"s3://b": True, str(tmp_path): False, str(tmp_path / "a-{0..1}.tar"): True}
    assert {data: job("--data", data).stream for data in streams} == streams
    assert job("--data", tmp_path, "--stream").stream


def test_the_chosen_rows_of_a_stream(tmp_path):
    shards(tmp_path)
    pieces = job("--data", tmp_path, "--stream", "--limit", 3).open(None)
    ids = {split: [r.id for r in joined(p)] for split, p in pieces.items()}
    every = {split: [r.id for r in joined(p)] for split, p in job("--data", tmp_path, "--stream").open(None).items()}
    assert ids == {split: of_split[:3] for split, of_split in every.items()} and ids["train"] == ["1a", "1b", "2a"]
    assert len(every["train"]) > 3
