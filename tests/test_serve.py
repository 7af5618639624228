"""The warm predictor: its probabilities, its batches, lines of JSON, and the endpoint without a network."""

import asyncio
import base64
import io
import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import encoded_course, light_course
from PIL import Image

from feats.errors import RowError, UsageError
from modeling.choices import VoteSettings
from modeling.prediction import raw_pairs, warm
from modeling.prediction.cached import predict_caches
from modeling.prediction.warm import Answer, BatchSettings, WarmPredictor
from modeling.runs.folder import load_run
from modeling.runs.listing import list_runs
from modeling.runs.run import Run
from modeling.serving import lines as serving_lines, web
from modeling.serving.lines import answer_lines

TEXTS = ["what a GREAT day :)", "sad, bad news", "", "rain #monday 🙁", "x" * 300]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return light_course(tmp_path_factory.mktemp("light"))


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    return load_run(list_runs(home / "runs")[0])


@pytest.fixture(scope="module")
def predictor(run: Run) -> Iterator[WarmPredictor]:
    with WarmPredictor(run, device="cpu", batches=BatchSettings(size=8, delay=0.1)) as made:
        yield made


@pytest.fixture(scope="module")
def pairs(home: Path) -> list[tuple[Path, str]]:
    return [(home / "set" / "data" / f"{k}.jpg", text) for k, text in enumerate(TEXTS)]


def by_caches(runs: Sequence[Run], picture: Path, text: str, folder: Path, **voting: Any) -> np.ndarray:
    """(C,) of one pair, through a cache on disk."""
    folder.mkdir()
    raw_pairs.encode(runs, raw_pairs.one_pair(picture, text, runs), folder, weights={}, device="cpu")
    return predict_caches(runs, folder, raw_pairs.SPLIT, VoteSettings(**voting)).probabilities[0]


def values(answer: Answer) -> list[float]:
    return list(answer.probabilities.values())


# -- the predictor ----------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_a_cache(predictor: WarmPredictor, run: Run, pairs, tmp_path: Path):
    for k, (picture, text) in enumerate(pairs):
        [answer] = predictor.predict_pairs([(picture, text)])
        expected = by_caches([run], picture, text, tmp_path / str(k))
        assert values(answer) == expected.tolist() and list(answer.probabilities) == run.classes
        assert answer.label == run.classes[expected.argmax()]
    assert len({tuple(values(a)) for a in predictor.predict_pairs(pairs)}) > 1


def test_networks_give_the_probabilities_of_a_cache(tmp_path: Path):
    """A convolutional net and a transformer; in a batch of several products may round otherwise."""
    root = encoded_course(tmp_path / "encoded")
    [path] = list_runs(root / "runs")
    run = load_run(path)
    pairs = [(root / "set" / "data" / f"{k}.jpg", text) for k, text in enumerate(TEXTS)]
    with WarmPredictor(path, device="cpu") as predictor:
        assert set(predictor.encoders) == {"efficientnet", "minilm", "vader"}
        [alone] = predictor.predict_pairs(pairs[:1])
        together = predictor.predict_pairs(pairs)
        assert values(alone) == by_caches([run], *pairs[0], tmp_path / "0").tolist()
        for answer, pair in zip(together, pairs, strict=True):
            np.testing.assert_allclose(values(answer), values(predictor.predict_pairs([pair])[0]), atol=1e-4)


@pytest.mark.parametrize("head", ["coattention", "gated_transformer"])
def test_token_features_of_texts_of_different_lengths(head: str, tmp_path: Path):
    from pairs import CLASSES, make_pairs, tiny_bert, tiny_vit

    from feats import roberta_extract_feats, vit_extract_feats
    from modeling import train_head

    make_pairs(tmp_path / "set")
    encoders = {"roberta": tiny_bert(tmp_path / "bert"), "vit": tiny_vit(tmp_path / "vit")}
    common = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "feats"), "--tokens", "--workers", "0"]
    for script, name in ((roberta_extract_feats, "roberta"), (vit_extract_feats, "vit")):
        assert script.main([*common, "--dtype", "fp32", "--device", "cpu", "--weights", encoders[name]["weights"]]) == 0
    folders = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    sides = ["--vtype", "vit", "--ttype", "roberta", "--head", head, "--D", "8"]
    assert train_head.main([*folders, *sides, "--ep", "1", "--val-ratio", "0.25"]) == 0
    [path] = list_runs(tmp_path / "runs")
    run = load_run(path)
    pairs = [
        (tmp_path / "set" / "data" / f"{k}.jpg", f"a very {name} day " * (k + 1)) for k, name in enumerate(CLASSES)
    ]
    weights = {name: given["weights"] for name, given in encoders.items()}
    folder = tmp_path / "raw"
    folder.mkdir()
    records = [raw_pairs.Record(str(k), *pair) for k, pair in enumerate(pairs)]
    raw_pairs.encode([run], records, folder, weights=weights, device="cpu")
    expected = predict_caches([run], folder, raw_pairs.SPLIT).probabilities
    with WarmPredictor(run, weights=weights, device="cpu") as predictor:
        np.testing.assert_allclose([values(a) for a in predictor.predict_pairs(pairs)], expected, atol=1e-6)


def test_a_picture_is_a_file_its_bytes_or_an_image(predictor: WarmPredictor, pairs):
    picture, text = pairs[1]
    [of_file] = predictor.predict_pairs([(picture, text)])
    for given in (str(picture), picture.read_bytes(), Image.open(picture)):
        assert predictor.predict_pairs([(given, text)]) == [of_file]


def test_what_is_submitted_together_is_encoded_together(predictor: WarmPredictor, pairs, monkeypatch):
    sizes = []
    predict = predictor._predict
    monkeypatch.setattr(predictor, "_predict", lambda batch: sizes.append(len(batch)) or predict(batch))
    one_by_one = [predictor.predict_pairs([pair])[0] for pair in pairs]
    sizes.clear()
    found: dict[int, Answer] = {}

    def ask(k: int) -> None:
        found[k] = predictor.submit(*pairs[k % len(pairs)]).result(30)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[k] for k in range(20)] == [one_by_one[k % len(pairs)] for k in range(20)]
    assert max(sizes) > 1 and max(sizes) <= 8 and sum(sizes) == 20


@pytest.mark.parametrize(
    "picture, text, reason",
    [
        (None, "a", "no image, which pixels reads"),
        (b"", "a", "picture file is empty"),
        (b"GIF89a, they say", "a", "picture"),
        ("nowhere.jpg", "a", "picture file is missing"),
        (Image.new("RGB", (4, 4)), None, "no text, which vader reads"),
        (Image.new("RGB", (4, 4)), "\ud800", "the text holds a lone surrogate"),
    ],
)
def test_a_bad_pair_says_why_and_harms_no_other(predictor: WarmPredictor, pairs, picture, text, reason: str):
    with pytest.raises(RowError, match=reason):
        predictor.predict_pairs([(picture, text)])
    bad, good = predictor.submit(picture, text), predictor.submit(*pairs[0])
    assert good.result(30) == predictor.predict_pairs(pairs[:1])[0]
    with pytest.raises(RowError, match=reason):
        bad.result(30)


@pytest.mark.parametrize("vote", ["soft", "majority"])
def test_several_runs_vote_as_elsewhere(home: Path, run: Run, pairs, vote: str, tmp_path: Path):
    from modeling import train_head

    folders = ["--feats", str(home / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert (
        train_head.main([*folders, "--vtype", "--ttype", "vader", "--D", "4", "--ep", "2", "--val-ratio", "0.25"]) == 0
    )
    runs = [run, load_run(list_runs(tmp_path / "runs")[0])]
    with WarmPredictor(runs, voting=VoteSettings(vote), device="cpu") as predictor:
        for k, pair in enumerate(pairs):
            assert (
                values(predictor.predict_pairs([pair])[0])
                == by_caches(runs, *pair, tmp_path / str(k), vote=vote).tolist()
            )


def test_what_cant_be_loaded_is_refused(run: Run, tmp_path: Path):
    with pytest.raises(UsageError, match="is no run"):
        WarmPredictor(tmp_path)
    with pytest.raises(UsageError, match="`tie` angry: no such class"):
        WarmPredictor(run, voting=VoteSettings(tie="angry"))
    with pytest.raises(UsageError, match="`weights` names clip; the caches in use are pixels, vader"):
        WarmPredictor(run, weights={"clip": "a.pt"})


def test_what_waits_is_answered_before_the_end_and_nothing_after_it(run: Run, pairs, monkeypatch):
    predictor = WarmPredictor(run, device="cpu", batches=BatchSettings(size=2, delay=0))
    answers = [predictor.submit(*pair) for pair in pairs]
    predictor.close()
    assert all(answer.done() for answer in answers)
    with pytest.raises(RuntimeError, match="closed"):
        predictor.submit(*pairs[0])
    predictor.close()


def test_an_unforeseen_error_reaches_those_who_wait(run: Run, pairs, monkeypatch):
    with WarmPredictor(run, device="cpu") as predictor:
        with monkeypatch.context() as patched:
            patched.setattr(warm, "encode_prepared", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                predictor.submit(*pairs[0]).result(30)
        assert predictor.submit(*pairs[0]).result(30).label in predictor.classes


# -- lines ------------------------------------------------------------------------------------------------------


def answers_to(predictor: WarmPredictor, *asked: bytes) -> list[dict[str, Any]]:
    said: list[str] = []
    assert answer_lines(predictor, io.BytesIO(b"\n".join(asked)), said.append) == len(said)
    assert not any("\n" in line for line in said)
    return [json.loads(line) for line in said]


def test_lines_are_answered_in_their_order(predictor: WarmPredictor, pairs):
    picture, text = pairs[0]
    data = base64.b64encode(picture.read_bytes()).decode()
    asked = [
        {"id": "é", "image": str(picture), "text": text},
        {"image": data, "text": text},
        {"id": 7.5, "image": f"data:image/jpeg;base64,{data}", "text": text, "more": 1},
    ]
    encoded = [json.dumps(pair).encode() for pair in asked]
    found = answers_to(predictor, encoded[0], b"", encoded[1], b"  ", encoded[2])
    [answer] = predictor.predict_pairs(pairs[:1])
    expected = {"label": answer.label, "probabilities": answer.probabilities}
    assert found == [{"id": "é", **expected}, {"id": 3, **expected}, {"id": 7.5, **expected}]


@pytest.mark.parametrize(
    "line, name, reason",
    [
        (b"nonsense", 1, "not valid JSON"),
        (b"\xff\xfe{}", 1, "not valid JSON"),
        (b"[" * 100_000, 1, "not valid JSON"),
        (b'{"id": NaN}', 1, "NaN is no JSON"),
        (b'["a"]', 1, "a JSON list; expected an object"),
        (b'{"id": [1]}', 1, "id is a JSON list"),
        (b'{"id": "a", "image": 3, "text": "x"}', "a", "image is a JSON int"),
        (b'{"id": "a", "image": "x.jpg", "text": {}}', "a", "text is a JSON dict"),
        (b'{"id": "a", "image": "x.jpg", "text": "x"}', "a", "picture file is missing"),
        (b'{"id": "a", "image": "data:image/png;base64,!!", "text": "x"}', "a", "isn't base64"),
        (b'{"id": "a", "text": "x"}', "a", "no image, which pixels reads"),
        (b'{"id": "a", "image": "' + b"QUFB" * 20 + b'", "text": "x"}', "a", "not a picture PIL can read"),
    ],
)
def test_a_bad_line_ends_nothing(predictor: WarmPredictor, pairs, line: bytes, name: object, reason: str):
    good = json.dumps({"image": str(pairs[0][0]), "text": "a"}).encode()
    bad, after = answers_to(predictor, line, good)
    assert bad["id"] == name and reason in bad["error"] and bad.keys() == {"id", "error"}
    assert after["id"] == 2 and "label" in after


def test_a_line_that_is_too_long_is_never_held(predictor: WarmPredictor, pairs, monkeypatch):
    monkeypatch.setattr(serving_lines, "LONGEST_LINE", 200)
    good = json.dumps({"image": pairs[0][0].name, "text": "a"}).encode()
    found = answers_to(predictor, b'{"text": "' + b"a" * 1000 + b'"}', good, b"b" * 201)
    assert ["longer than" in one["error"] for one in found] == [True, False, True]
    assert [one["id"] for one in found] == [1, 2, 3]


def test_an_answer_doesnt_wait_for_the_next_line(predictor: WarmPredictor, pairs):
    """The second line is sent when the first is answered."""
    answered = threading.Event()
    line = json.dumps({"image": str(pairs[0][0]), "text": "a"}).encode() + b"\n"

    class Asking(io.RawIOBase):
        sent = 0

        def readline(self, size: int = -1) -> bytes:
            if self.sent:
                assert answered.wait(30), "no answer before the next line"
            self.sent += 1
            return line if self.sent < 3 else b""

    assert answer_lines(predictor, Asking(), lambda text: answered.set()) == 2


def test_an_output_that_fails_ends_the_reading(predictor: WarmPredictor, pairs):
    line = json.dumps({"image": str(pairs[0][0]), "text": "a"}).encode() + b"\n"

    def gone(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        answer_lines(predictor, io.BytesIO(line * 500), gone)


# -- the endpoint -----------------------------------------------------------------------------------------------


async def asked(app, method: str, path: str, body: Sequence[bytes] = (), **headers: str) -> tuple[int, dict, bytes]:
    """Status, headers and body of an answer; the request's body in pieces."""
    given = {"host": "127.0.0.1:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
    }
    coming = [{"type": "http.request", "body": piece, "more_body": True} for piece in body]
    coming.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return coming.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *rest = sent
    names = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], names, b"".join(part.get("body", b"") for part in rest)


def ask(app, *given: Any, **headers: str) -> tuple[int, Any]:
    """Status and JSON of an answer, which is one line."""
    status, answered, body = asyncio.run(asked(app, *given, **headers))
    assert answered["content-type"] == "application/json" and body.count(b"\n") == 1
    assert not any(name.startswith("access-control") for name in answered)
    return status, json.loads(body)


def json_body(picture: Path, text: str) -> list[bytes]:
    data = base64.b64encode(picture.read_bytes()).decode()
    return [json.dumps({"image": data, "text": text}).encode()]


def form_body(**fields: bytes | str) -> list[bytes]:
    """A multipart form: bytes are files."""
    parts = []
    for name, value in fields.items():
        file = '; filename="a.jpg"\r\nContent-Type: image/jpeg' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode()
        parts.append(
            f'--cut\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return [*parts, b"--cut--\r\n"]


JSON, FORM = {"content_type": "application/json"}, {"content_type": "multipart/form-data; boundary=cut"}
POST = ("POST", "/predict")


@pytest.fixture(scope="module")
def app(predictor: WarmPredictor):
    return web.make_app(predictor)


def test_json_and_forms_get_the_same_answer(app, predictor: WarmPredictor, pairs):
    picture, text = pairs[3]
    [answer] = predictor.predict_pairs([(picture, text)])
    expected = 200, {"label": answer.label, "probabilities": answer.probabilities}
    assert ask(app, *POST, json_body(picture, text), **JSON) == expected
    assert ask(app, *POST, form_body(image=picture.read_bytes(), text=text), **FORM) == expected


def test_requests_at_the_same_time_share_a_batch(app, predictor: WarmPredictor, pairs, monkeypatch):
    expected = [predictor.predict_pairs([pair])[0] for pair in pairs]
    sizes = []
    predict = predictor._predict
    monkeypatch.setattr(predictor, "_predict", lambda batch: sizes.append(len(batch)) or predict(batch))

    async def all_at_once() -> list[tuple[int, dict, bytes]]:
        return await asyncio.gather(*(asked(app, *POST, json_body(*pair), **JSON) for pair in pairs))

    found = asyncio.run(all_at_once())
    assert [json.loads(body)["probabilities"] for _, _, body in found] == [a.probabilities for a in expected]
    assert sizes == [len(pairs)]


def test_health_tells_what_is_served(app, run: Run):
    status, found = ask(app, "GET", "/health")
    assert status == 200 and found["status"] == "ok" and found["uptime_seconds"] >= 0
    assert found["runs"] == [str(run.path)] and found["classes"] == run.classes
    assert {name: one["encoder"] for name, one in found["encoders"].items()} == {"pixels": "pixels", "vader": "vader"}


def test_the_page_asks_for_nothing_elsewhere_and_escapes(app, predictor: WarmPredictor, run: Run):
    status, headers, body = asyncio.run(asked(app, "GET", "/"))
    page = body.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.findall(r'(?:src|href)="(?!data:,)|https?://|@import|url\(', page)
    assert 'id="image"' in page and 'id="text"' in page and run.path.name in page
    foreign = type("Foreign", (), {"runs": [], "classes": [], "device": "<script>", "encoders": {}})()
    assert "<script>" not in web.page_of(foreign).partition("</form>")[0]


@pytest.mark.parametrize("content", [b"", b"no picture", b"GIF89a and so on"])
def test_what_is_no_picture(app, content: bytes):
    status, found = ask(app, *POST, form_body(image=content, text="a"), **FORM)
    assert status == 400 and ("picture" in found["error"] or "no image" in found["error"])


@pytest.mark.parametrize(
    "body, kind, reason",
    [
        ([b"{"], JSON, "not valid JSON"),
        ([b"[" * 100_000], JSON, "not valid JSON"),
        ([b"\xff"], JSON, "not valid JSON"),
        ([b"[]"], JSON, "a JSON list"),
        ([b'{"image": "/etc/hostname", "text": "a"}'], JSON, "isn't base64"),
        ([b'{"image": "QUFB", "text": "a"}'], JSON, "not a picture PIL can read"),
        ([b'{"image": "QUFB", "text": 3}'], JSON, "text is a JSON int"),
        ([b'{"text": "a"}'], JSON, "no image, which pixels reads"),
        (form_body(image="/etc/hostname", text="a"), FORM, "expected image as a file"),
        (form_body(image=b"a", text=b"a"), FORM, ""),
        ([b"no form"], FORM, ""),
        ([b"a=b"], {"content_type": "application/x-www-form-urlencoded"}, "content type application/x-www-form"),
        ([b"a"], {}, "content type none"),
    ],
)
def test_what_cant_be_predicted_is_a_400(app, body: list[bytes], kind: dict[str, str], reason: str):
    status, found = ask(app, *POST, body, **kind)
    assert status == 400 and reason in found["error"] and found["error"]


def test_pictures_of_too_many_pixels(app, monkeypatch, pairs):
    monkeypatch.setattr("feats.images.MAX_PIXELS", 1000)
    status, found = ask(app, *POST, json_body(*pairs[0]), **JSON)
    assert status == 400 and "more than 1000 pixels" in found["error"]


@pytest.mark.parametrize("told", [True, False], ids=["with a length", "in pieces"])
@pytest.mark.parametrize("kind", [JSON, FORM], ids=["json", "form"])
def test_a_large_body_is_refused(predictor: WarmPredictor, kind: dict[str, str], told: bool):
    app = web.make_app(predictor, web.WebSettings(max_body=5000))
    body = form_body(image=b"a" * 4000, text="b" * 4000) if kind is FORM else [b"a" * 3000] * 3
    length = {"content_length": str(sum(map(len, body)))} if told else {}
    status, found = ask(app, *POST, body, **kind, **length)
    assert (status, found) == (413, {"error": "the request is larger than 5000 bytes"})


def test_too_many_requests_at_a_time(predictor: WarmPredictor, pairs):
    app = web.make_app(predictor, web.WebSettings(max_requests=2))

    async def all_at_once() -> list[int]:
        found = await asyncio.gather(*(asked(app, *POST, json_body(*pair), **JSON) for pair in pairs[:4]))
        return [status for status, _, _ in found]

    assert sorted(asyncio.run(all_at_once())) == [200, 200, 503, 503]
    assert ask(app, *POST, json_body(*pairs[0]), **JSON)[0] == 200


@pytest.mark.parametrize("method, path, status", [("GET", "/predict", 405), ("GET", "/../etc", 404), ("PUT", "/", 405)])
def test_what_isnt_there_is_said_in_json(app, method: str, path: str, status: int):
    assert ask(app, method, path)[0] == status


@pytest.mark.parametrize(
    "host, at, ours",
    [
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("localhost:8000", "127.0.0.1", True),
        ("[::1]:8000", "::1", True),
        ("evil.example:8000", "127.0.0.1", False),
        ("evil.example", "0.0.0.0", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("192.168.1.5:8000", "127.0.0.1", False),
        ("192.168.1.5:8000", "0.0.0.0", True),
        ("my.house:80", "my.house", True),
        ("", "127.0.0.1", False),
        ("localhost@evil.example", "127.0.0.1", False),
    ],
)
def test_only_our_own_host_is_answered(predictor: WarmPredictor, host: str, at: str, ours: bool):
    """Another name that points here is another page's (DNS rebinding)."""
    app = web.make_app(predictor, web.WebSettings(host=at))
    status, found = ask(app, "GET", "/health", host=host)
    assert status == (200 if ours else 421) and ("error" in found) is not ours


def test_pages_of_other_origins_are_refused(app):
    assert ask(app, "GET", "/health", origin="http://127.0.0.1:8000")[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999"):
        assert ask(app, "GET", "/health", origin=origin)[0] == 403


def test_ports_that_are_taken(predictor: WarmPredictor):
    with web.listening(web.WebSettings(port=0)) as sock:
        with pytest.raises(UsageError, match="another `port`"):
            web.listening(web.WebSettings(port=sock.getsockname()[1]))
    with pytest.raises(UsageError, match="another `port`"):
        web.listening(web.WebSettings(port=70_000))
