"""A small endpoint for programs and people on this machine: POST /predict, GET /health, and a page at /.

Starlette and uvicorn: few pure-Python dependencies, and a body is read piece by piece, so that one too large is refused
in our own words before it is held. (WSGI servers hand over bodies that they have read as a whole.)
"""

import asyncio
import ipaddress
import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feats.errors import RowError, UsageError
from feats.source import SIDES
from modeling.prediction.warm import WarmPredictor
from modeling.report.template import environment
from modeling.serving.json_pairs import as_json, picture_data, text_of

TEMPLATES = Path(__file__).parent / "templates"
POLICY = (
    "default-src 'none'; img-src blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
DRAINED = 8  # times the largest body: as much of a larger one is read before it is refused
STOPPING_SECONDS = 5  # for answers that are under way when the server is stopped


@dataclass(frozen=True)
class WebSettings:
    """Where to listen, and how much to take: bytes of a request's body, and requests at a time."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body: int = 16 << 20
    max_requests: int = 64


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(settings: WebSettings) -> socket.socket:
    """A socket at the host and port; port 0 is any free one. Raises `UsageError` when there is none to be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"can't listen at port {settings.port} of {settings.host} ({reason}); give another `port`, or a `host` of "
            "this machine"
        ) from None


def serve(predictor: WarmPredictor, sock: socket.socket, settings: WebSettings) -> None:
    """Answer requests at `sock` until the process is told to stop; then those under way, and none more. (uvicorn raises
    the signal again at the end.)"""
    import uvicorn

    config = uvicorn.Config(
        make_app(predictor, settings),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOPPING_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[sock])


def make_app(predictor: WarmPredictor, settings: WebSettings = WebSettings()) -> ASGIApp:
    """The application. Errors are one line of JSON, {"error"}: 400 for what can't be predicted, 403 for a page of
    another origin, 413 for a body that is too large, 421 for a host that isn't ours, 503 for too many at a time."""
    started, answered, under_way = time.monotonic(), 0, 0

    async def predict(request: Request) -> Response:
        nonlocal answered, under_way
        if under_way >= settings.max_requests:
            raise HTTPException(503, f"{under_way} requests are under way; try again")
        under_way += 1
        try:
            picture, text = await _pair_of(request)
            answer = await asyncio.wrap_future(predictor.submit(picture, text))
        except RowError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            under_way -= 1
        answered += 1
        return _json(as_json(answer))

    async def health(request: Request) -> Response:
        seconds = round(time.monotonic() - started, 3)
        return _json({"status": "ok", **facts_of(predictor), "answered": answered, "uptime_seconds": seconds})

    async def page(request: Request) -> Response:
        return HTMLResponse(page_of(predictor), headers=HEADERS)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, error.detail, error.headers or {})

    async def failed(request: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__} inside; the server's terminal tells more")

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/predict", predict, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refuse, Exception: failed})
    return _Guard(app, settings)


def facts_of(predictor: WarmPredictor) -> dict[str, Any]:
    """What is served: runs, their classes, the encoders of their caches, the sides that are read."""
    encoders = {
        name: {key: encoder.identity.get(key) for key in ("encoder", "model", "weights_sha256")}
        for name, encoder in predictor.encoders.items()
    }
    return {
        "runs": [run.named for run in predictor.runs],
        "classes": predictor.classes,
        "sides": [side for side in SIDES if any(run.source.of(side) for run in predictor.runs)],
        "encoders": encoders,
        "device": str(predictor.device),
    }


def page_of(predictor: WarmPredictor) -> str:
    """The page, which asks for nothing but /predict."""
    return environment(TEMPLATES).get_template("pair.html").render(**facts_of(predictor))


# -- what is asked ----------------------------------------------------------------------------------------------


async def _pair_of(request: Request) -> tuple[bytes | None, str | None]:
    """Picture and text of a request: JSON, or a form's fields. Raises `RowError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=2, max_part_size=1 << 20) as form:
                image, text = form.get("image"), form.get("text")
                if isinstance(text, UploadFile) or isinstance(image, str):
                    raise RowError("expected image as a file and text as text in the form")
                # A browser sends an empty file for a field that was left out.
                return (await image.read() or None) if image is not None else None, text
        if kind != "application/json":
            raise RowError(f"content type {kind or 'none'}; expected application/json or multipart/form-data")
        pair = json.loads(await request.body())
    except ClientDisconnect:
        raise RowError("the client is gone") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON ({error})") from None
    if not isinstance(pair, dict):
        raise RowError(f"a JSON {type(pair).__name__}; expected an object with image, text or both")
    return picture_data(pair.get("image")), text_of(pair)


class _TooLarge(HTTPException):
    def __init__(self, most: int):
        super().__init__(413, f"the request is larger than {most} bytes", {"Connection": "close"})


class _Guard:
    """Lets through what is asked of this host, by no page of another, with a body that isn't too large.

    A page anywhere can make its own name point at this machine and then read answers as its own (DNS rebinding): the
    Host that the browser sends is still that name.
    """

    def __init__(self, app: ASGIApp, settings: WebSettings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not _is_ours(host, self.settings.host):
            await _error(421, f"host {host[:100]!r} isn't this server's")(scope, receive, send)
        elif origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            await _error(403, f"origin {origin[:100]!r} isn't this server's")(scope, receive, send)
        elif int(headers.get("content-length") or 0) > self.settings.max_body:
            if "expect" not in headers:
                await _drain(receive, DRAINED * self.settings.max_body)
            too_large = _TooLarge(self.settings.max_body)
            await _error(413, too_large.detail, too_large.headers or {})(scope, receive, send)
        else:
            await self.app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """Counts what comes in pieces and names no length."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.settings.max_body:
                if message.get("more_body"):
                    await _drain(receive, DRAINED * self.settings.max_body)
                raise _TooLarge(self.settings.max_body)
            return message

        return limited


async def _drain(receive: Receive, most: int) -> None:
    """Read a body to its end and forget it, or `most` bytes of it: many clients hear nothing before they have sent
    all."""
    more = True
    while more and most > 0:
        message = await receive()
        more = message.get("more_body", False)
        most -= len(message.get("body", b""))


def _is_ours(host: str, listening_at: str) -> bool:
    """Whether a Host header names this server: an address (nobody can make that point elsewhere), localhost, or the
    name it listens at. On the loopback only a loopback address."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(:\d+)?", host)
    if not match:
        return False
    name = match[1].strip("[]").lower().rstrip(".")
    if name in ("localhost", listening_at.lower()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return not is_loopback(listening_at) and name in (socket.gethostname().lower(), socket.getfqdn().lower())
    return address.is_loopback or not is_loopback(listening_at)


# -- what is answered -------------------------------------------------------------------------------------------


def _json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """One line of JSON."""
    body = json.dumps(content, ensure_ascii=False) + "\n"
    return Response(body, status, {**HEADERS, **headers}, "application/json")


def _error(status: int, message: str, headers: Mapping[str, str] = {}) -> Response:
    return _json({"error": message}, status, headers)
