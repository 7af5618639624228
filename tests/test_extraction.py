"""Extraction from Python: the public names, plans and blocks, and what a cache tells of where its pairs lie."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
import torch
from caches import assert_same
from conftest import ROOT, make_course

import feats
from feats import cache_layout, inspect_feats
from feats.cache_reader import DONE, PENDING
from feats.encoders.base import Encoder, Features, ImageSide, Loading, TextSide, Tokens
from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from feats.extraction.encode import encode_block, encode_blocks
from feats.extraction.local import create_store, extract, write_block
from feats.extraction.plan import make_plan
from feats.extraction.settings import ExtractionSettings
from feats.images import ResizeCrop
from feats.records import Pairs, Record, read_dataset
from feats.store import FeatureStore

ALONE = ExtractionSettings(workers=0, batch_size=2)  # blocks of 16 rows


def both_sides(tokens: bool = True) -> Encoder:
    """An encoder of both sides whose values depend on the batch, as real ones' do in their last bits."""

    def image(pixels: torch.Tensor) -> Features:
        flat = pixels.mean((2, 3))
        return {"feats": flat + 1e-3 * len(pixels), "tokens": torch.stack([flat, -flat], 1)}

    def text(ids: list[str]) -> Features:
        longest = max(map(len, ids))
        states = torch.tensor([[[float(ord(c) % 7), longest] for c in i.ljust(longest)] for i in ids])
        return {"feats": states.mean(1), "tokens": states}

    def tokenize(texts: list[str]) -> list[Tokens]:
        return [Tokens(text or " ", max(len(text), 1)) for text in texts]

    loading = Loading(torch.device("cpu"), torch.float32, tokens)
    side = ImageSide(ResizeCrop(8, 8, "bilinear"), [0.5] * 3, [0.5] * 3, image)
    return Encoder({"encoder": "both"}, loading, side, TextSide(tokenize, text))


# -- as the README has it ----------------------------------------------------------------------------------------


def test_the_readme_s_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    make_course(tmp_path / "data", 6)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = next(block for block in readme.split("```python\n")[1:] if block.startswith("from feats import"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.split("```")[0], names)
    out = capsys.readouterr().out
    assert out.startswith("minilm_train: 6 rows done; 0 quarantined") and out.endswith("(1, 384)\n")
    assert names["some"].shape == (2, 384) and names["frame"]["text_feats"].shape == (6, 384)
    assert names["place"] == tmp_path / "data" / "data" / "0.txt"


def test_from_a_folder_to_arrays(course: Path, tmp_path: Path):
    data = read_dataset(course)
    summary = extract(load_encoder("vader"), data["train"], tmp_path / "vader_train.h5")
    assert (summary.done, summary.encoded, summary.quarantined) == (20, 20, 0)
    with FeatureStore.open(tmp_path / "vader_train.h5") as store:
        frame = store.to_frame()
        assert store.fingerprint["text_clean"] == "none"  # the encoder's own level
    assert list(frame.ids) == [str(i) for i in range(20)] and len(frame) == 20
    assert list(frame.labels[:3]) == ["positive", "negative", "neutral"]
    expected = load_encoder("vader").encode(texts=[record.text for record in data["train"]])["text"]
    np.testing.assert_allclose(frame["text_feats"].astype(np.float32), expected, atol=1e-3)
    assert extract(load_encoder("vader"), data["train"], str(tmp_path / "vader_train.h5")).encoded == 0
    with pytest.raises(UsageError, match="no split dev in the data; it has train, test"):
        data["dev"]


def test_a_frame_holds_finished_rows_only(course: Path, tmp_path: Path):
    (course / "data" / "3.jpg").write_bytes(b"no picture")
    extract(both_sides(), read_dataset(course)["train"], tmp_path / "x.h5", ALONE)
    with FeatureStore.open(tmp_path / "x.h5") as store:
        frame = store.to_frame()
        assert frame.arrays.keys() == {"image_feats", "image_tokens", "text_feats"}  # ragged ones have no such shape
        assert "3" not in frame.ids and len(frame) == 19
        np.testing.assert_array_equal(frame["text_feats"], store.read("text_feats", list(frame.ids)))
        assert store.to_frame("image_feats").arrays.keys() == {"image_feats"}
        with pytest.raises(UsageError, match="holds no image_views"):
            store.to_frame("image_views")


def test_progress_is_told_to_whom_asks(course: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    told: list[tuple[int, int]] = []
    records = read_dataset(course)["train"]
    extract(both_sides(), records, tmp_path / "x.h5", ALONE, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 20) for done in range(0, 21, 2)]  # by batches
    told.clear()
    extract(both_sides(), records, tmp_path / "x.h5", ALONE, progress=lambda done, total: told.append((done, total)))
    assert told == []
    assert capfd.readouterr() == ("", "")


def test_warnings_are_python_s(course: Path, tmp_path: Path):
    records = read_dataset(course)["train"]
    extract(both_sides(), records, tmp_path / "x.h5", ALONE)
    with FeatureStore.append(tmp_path / "x.h5") as store:
        store._file.attrs.modify("complete", False)
        store._set_status(np.arange(16, 20), PENDING)
    with pytest.warns(UserWarning, match="was begun with batches of 2; with 4 its features may differ"):
        extract(both_sides(), records, tmp_path / "x.h5", ExtractionSettings(workers=0, batch_size=4))


def test_settings_and_plans_can_t_be_changed(course: Path):
    plan = make_plan(both_sides(), read_dataset(course)["train"], ALONE)
    for frozen, field in ((ALONE, "batch_size"), (plan, "blocks")):
        with pytest.raises(AttributeError):
            setattr(frozen, field, 3)


# -- plan and blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
def test_blocks_in_any_order_make_the_same_cache(tokens: bool, tmp_path: Path):
    """A block is a pure function of the plan and its number: whoever encodes it, whenever, however often."""
    data = make_course(tmp_path / "set", 70)
    (data / "data" / "40.jpg").write_bytes(b"no picture")
    (data / "data" / "41.txt").unlink()
    settings = ExtractionSettings(workers=0, batch_size=2, views=1)
    records = read_dataset(data)["train"]
    extract(both_sides(tokens), records, tmp_path / "whole.h5", settings)
    plan = make_plan(both_sides(tokens), records, settings)
    assert [len(rows) for rows in plan.blocks] == [16, 16, 16, 16, 6]
    order = [3, 0, 4, 2, 1]
    with create_store(plan, tmp_path / "parts.h5") as store:
        for number in order:
            encode_block(plan, number)  # of no consequence
            another = make_plan(both_sides(tokens), records, settings)  # as another process would make it
            write_block(store, encode_block(another, number))
        assert store.finish()
    assert_same(tmp_path / "parts.h5", tmp_path / "whole.h5")
    with FeatureStore.open(tmp_path / "parts.h5") as store:
        assert store.reasons.keys() == {"40", "41"} and store.verify() == []
    ahead = encode_blocks(plan, order, workers=2)
    for number, block in zip(order, ahead, strict=True):
        alone = encode_block(plan, number)
        assert np.array_equal(block.rows, alone.rows) and np.array_equal(block.done, alone.done)
        assert block.reasons == alone.reasons and block.arrays.keys() == alone.arrays.keys()
        assert all(block.arrays[key].tobytes() == alone.arrays[key].tobytes() for key in alone.arrays)


@pytest.mark.parametrize("level", ["none", "basic", "tweet"])
@pytest.mark.parametrize("tokens", [False, True])
def test_each_text_is_cleaned_once(
    level: str, tokens: bool, course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """For the encoder, the duplicate key and the count of its tokens together."""
    cleaned: list[str] = []
    real = ftfy.fix_text
    monkeypatch.setattr(ftfy, "fix_text", lambda text, *more: cleaned.append(text) or real(text, *more))
    records = read_dataset(course)["train"]
    settings = ExtractionSettings(workers=0, batch_size=2, text_clean=level)
    extract(both_sides(tokens), records, tmp_path / "x.h5", settings)
    assert sorted(cleaned) == sorted(record.text.replace("\n", " ") for record in records)
    cleaned.clear()
    extract(both_sides(tokens), records, tmp_path / "x.h5", settings)
    assert cleaned == []


def test_a_text_without_room_is_explained_in_plain_words(course: Path, tmp_path: Path, capsys):
    """Reasons are shown as they are, by whoever reads the cache."""
    (course / "data" / "4.txt").rename(tmp_path / "4.txt")
    cache = tmp_path / "x.h5"
    for _ in range(2):
        extract(both_sides(), read_dataset(course)["train"], cache, ALONE)
        shutil.copy(tmp_path / "4.txt", course / "data")
    inspect_feats.main([str(cache)])
    shown = capsys.readouterr().out
    assert "1 when the cache was made; overwrite the cache" in shown and "`" not in shown


def test_one_text_is_no_list_of_texts():
    with pytest.raises(UsageError, match="`texts` 'so happy' is one text, expected a list"):
        both_sides().encode(texts="so happy")


# -- where the pairs lie -----------------------------------------------------------------------------------------


def source_of(path: Path) -> feats.Source:
    with FeatureStore.open(path) as store:
        found = store.source
    assert found is not None
    return found


def test_a_cache_tells_where_its_pairs_lie(course: Path, tmp_path: Path, monkeypatch, capsys):
    (course / "data" / "4.jpg").unlink()
    monkeypatch.chdir(tmp_path)
    extract(load_encoder("vader"), read_dataset("set")["train"][:5], "x.h5", ALONE)
    found = source_of(tmp_path / "x.h5")
    assert (found.data, found.resolved) == ("set", str(course.resolve()))
    assert (found.layout, found.split, found.folder) == ("course", "train", course.resolve())
    assert found.images == ["data/0.jpg", "data/1.jpg", "data/2.jpg", "data/3.jpg", ""]
    assert found.texts == [f"data/{i}.txt" for i in range(5)]
    assert all((found.folder / path).is_file() for path in [*found.images, *found.texts] if path)
    assert inspect_feats.main(["x.h5", "--verify"]) == 0
    out = capsys.readouterr().out
    assert f"source: set ({course.resolve()}), layout course, split train" in out
    assert "4 picture files, the first data/0.jpg" in out and "5 text files, the first data/0.txt" in out


def test_a_moved_data_folder_is_brought_up_to_date(course: Path, tmp_path: Path):
    """Its place is no part of the fingerprint, and never a reason to refuse or to encode again."""
    cache = tmp_path / "x.h5"
    extract(both_sides(), read_dataset(course)["train"], cache, ALONE)
    fingerprint = json.dumps(FeatureStore.open(cache).fingerprint)
    moved = tmp_path / "elsewhere"
    shutil.move(course, moved)
    (moved / "data").rename(moved / "pics_texts_pair")
    assert extract(both_sides(), read_dataset(moved)["train"], cache, ALONE).encoded == 0
    assert source_of(cache).data == str(moved) and source_of(cache).images[3] == "pics_texts_pair/3.jpg"
    long = tmp_path / ("far/" * 30)
    long.mkdir(parents=True)
    records = read_dataset(moved)["train"]
    far = Pairs([Record(r.id, r.image_path, r.text, r.label) for r in records], long / "x.csv", "manifest", "train")
    assert extract(both_sides(), far, cache, ALONE).encoded == 0  # "../../../..." has no room
    assert source_of(cache).layout == "manifest" and source_of(cache).images[3] == ""
    assert json.dumps(FeatureStore.open(cache).fingerprint) == fingerprint
    with FeatureStore.open(cache) as store:
        assert store.complete and (store.status == DONE).all() and store.verify() == []


def test_sources_of_manifests_and_tars(tmp_path: Path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "t.txt").write_text("a text")
    (tmp_path / "m" / "m.csv").write_text("id,image,text\n1,a/b.png,inline\n2,../c.png,t.txt\n3,,t.txt\n")
    source = read_dataset(tmp_path / "m" / "m.csv")["train"].source
    assert source.folder == tmp_path / "m" and source.images == ["a/b.png", "../c.png", ""]
    assert source.texts == ["", "t.txt", "t.txt"]
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "train-0.tar", "w") as tar:
        for name in ("x/1.jpg", "x/1.txt", "2.jpg", "2.json"):
            info = tarfile.TarInfo(name)
            content = b'{"text": "inline"}' if name.endswith("json") else b"content"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for place in (tmp_path / "s", tmp_path / "s" / "train-0.tar"):
        source = read_dataset(place)["train"].source
        assert source.folder == tmp_path / "s"
        assert source.images == ["train-0.tar::x/1.jpg", "train-0.tar::2.jpg"]
        assert source.texts == ["train-0.tar::x/1.txt", ""]


def test_names_that_can_t_be_kept_are_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"id": "1", "image": "x" * 5000}, {"id": "2", "image": "a\0b"}, {"id": "3", "image": "\ud83d.png"}]
    lines = [json.dumps({**row, "text": "fine"}) for row in [*rows, {"id": "4", "image": "ü/😀.png"}]]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    data = read_dataset(tmp_path / "m.jsonl")
    assert extract(load_encoder("vader"), data["train"], tmp_path / "x.h5", ALONE).done == 4
    assert source_of(tmp_path / "x.h5").images == ["", "", "", "ü/😀.png"]
    monkeypatch.setattr(cache_layout, "SOURCE_BYTES", 50)  # less than the rest takes
    extract(load_encoder("vader"), data["train"], tmp_path / "y.h5", ALONE)
    assert FeatureStore.open(tmp_path / "y.h5").source is None


def test_records_of_one_s_own_have_no_source(tmp_path: Path):
    cache = tmp_path / "x.h5"
    extract(load_encoder("vader"), [Record("a", None, "so happy")], cache, ALONE)
    with FeatureStore.open(cache) as store:
        assert store.source is None and "image_path" not in store.schema
    pairs = Pairs([Record("a", None, "so happy")], tmp_path, "course", "train")
    assert extract(load_encoder("vader"), pairs, cache, ALONE).encoded == 0
    with FeatureStore.open(cache) as store:
        assert store.source is None


def test_torn_paths_are_written_again(course: Path, tmp_path: Path):
    """A kill in the midst of an update leaves chunks whose checksum fails; they are no reason to refuse."""
    cache = tmp_path / "x.h5"
    extract(both_sides(), read_dataset(course)["train"], cache, ALONE)
    with FeatureStore.open(cache) as store:
        offset = store._file["image_path"].id.get_chunk_info(0).byte_offset
        before = store.source
    with cache.open("r+b") as file:
        file.seek(offset + 3)
        file.write(b"\xff\xfe")
    with FeatureStore.open(cache) as store, pytest.raises(UsageError, match="paths can't be read"):
        store.source  # noqa: B018
    assert extract(both_sides(), read_dataset(course)["train"], cache, ALONE).encoded == 0
    assert source_of(cache) == before
