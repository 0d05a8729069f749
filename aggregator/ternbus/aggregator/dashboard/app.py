"""The dashboard's addresses: the page and its files, what it reads, and what it may do."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ternbus.aggregator.core.health import State
from ternbus.aggregator.dashboard import actions, devices, metrics, summary
from ternbus.aggregator.dashboard.actions import ACTIONS, Asked
from ternbus.aggregator.dashboard.audit import Audit
from ternbus.aggregator.dashboard.guard import Guard
from ternbus.aggregator.dashboard.reader import Paced, Reader
from ternbus.aggregator.dashboard.sessions import LIFE_S, Session, Sessions, TooManyError
from ternbus.aggregator.shell import version_commands
from ternbus.broker.errors import FederationError
from ternbus.broker.path_errors import sentence

VIEWERS_MAX: Final = 64
BODY_WITHIN_S: Final = 10.0
WAITING_MAX: Final = 8  # actions, one after the other
BEARER: Final = "Bearer "
TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE: Final = "index.html"
ALIVE: Final = b"event: alive\ndata: {}\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """A file of the page, in memory: no request becomes a path."""

    content: bytes
    media_type: str
    etag: str


def static_files() -> dict[str, StaticFile]:
    """By name below `/static/`."""
    found = {}
    folder = resources.files(__package__) / "static"
    for place in (folder, folder / "vendor"):
        for each in place.iterdir():
            kind = TYPES.get(Path(each.name).suffix)
            if kind is not None:
                content = each.read_bytes()
                found[each.name] = StaticFile(
                    content=content, media_type=kind, etag=f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                )
    return found


@dataclass(slots=True, kw_only=True)
class Dashboard:
    """The handlers of all addresses. ``is_private``: reading needs the token too."""

    directory: Path
    port: int
    is_private: bool
    sessions: Sessions
    audit: Audit
    reader: Reader
    _files: dict[str, StaticFile] = field(default_factory=static_files)
    _acting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waiting: int = 0
    _exposition: Paced[tuple[bytes, str]] = field(init=False)

    def __post_init__(self) -> None:
        self._exposition = Paced(partial(metrics.exposition, self.directory), self.reader.pool)

    def application(self, hosts: frozenset[str]) -> ASGIApp:
        """The whole, for requests to these hosts."""
        reads: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "/events": self.events,
            "/history": self.history,
            "/devices": self.devices,
            "/versions/{version:int}": self.version,
            "/health": self.health,
            "/metrics": self.metrics,
        }
        routes = [
            Route("/", self.page),
            Route("/static/{name}", self.static),
            Route("/session", self.session),
            Route("/audit", self.records),
            *(Route(path, self._readable(handler)) for path, handler in reads.items()),
            Route("/login", self.login, methods=["POST"]),
            Route("/logout", self.logout, methods=["POST"]),
            Route("/actions/{name}", self.act, methods=["POST"]),
        ]
        faults: Mapping[Any, Callable[[Request, Any], Response]] = {
            HTTPException: lambda _, error: JSONResponse({"error": error.detail}, error.status_code, error.headers),
            TooManyError: lambda *_: JSONResponse(
                {"error": "too many tries: wait a minute"}, 429, {"Retry-After": "60"}
            ),
            FederationError: lambda _, error: JSONResponse({"error": str(error)}, 409),
            OSError: lambda _, error: JSONResponse({"error": sentence(error, self.directory)}, 503),
        }
        return Guard(Starlette(routes=routes, exception_handlers=faults), hosts)

    # The page

    async def page(self, request: Request) -> Response:
        """The page, which holds no figures."""
        return self._file(request, PAGE)

    async def static(self, request: Request) -> Response:
        return self._file(request, request.path_params["name"])

    def _file(self, request: Request, name: str) -> Response:
        found = self._files.get(name)
        if found is None:
            raise HTTPException(404, "there is no such file")
        about = {"ETag": found.etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=about)
        return Response(found.content, media_type=found.media_type, headers=about)

    # Reading

    async def events(self, request: Request) -> Response:
        """Server-sent events: the state of each look. A viewer that reads slowly misses some."""
        if self.reader.viewers >= VIEWERS_MAX:
            raise HTTPException(503, f"{VIEWERS_MAX} pages are open already: close some")
        return _Events(self._stream(request))

    async def _stream(self, request: Request) -> AsyncGenerator[bytes, None]:
        yield b"retry: 2000\n\n"
        async with aclosing(self.reader.follow()) as moments:
            async for moment in moments:
                if not (self._may_read(request) or _bearer(request)):  # a program has shown the token at the start
                    yield b"event: logout\ndata: {}\n\n"
                    return
                yield ALIVE if moment is None else moment.event

    async def history(self, request: Request) -> Response:
        """The versions above `?after=`, as columns."""
        await self.reader.moment()
        return _json(self.reader.history.columns(_number(request, "after", -1)))

    async def devices(self, request: Request) -> Response:
        """A page of the table of devices: `?search=&sort=&descending=&offset=&limit=`."""
        moment = await self.reader.moment()
        if moment.devices is None:
            raise HTTPException(503, moment.fault)
        page = moment.devices.page(
            search=request.query_params.get("search", ""),
            sort=request.query_params.get("sort", devices.WORST),
            descending=request.query_params.get("descending") == "yes",
            offset=_number(request, "offset", 0),
            limit=_number(request, "limit", devices.LIMIT),
        )
        return _json({**page, "fault": moment.fault})

    async def version(self, request: Request) -> Response:
        """A version's entry in the log of merges."""
        version = request.path_params["version"]
        if version > version_commands.VERSION_MAX:
            raise HTTPException(404, "there is no such version")
        return _json(await self.reader.entry(version))

    async def health(self, _: Request) -> Response:
        """The health as `aggregator status --check --json` prints it; 503 where no version can be made."""
        moment = await self.reader.moment()
        if moment.health is None:
            unknown = {"state": State.UNKNOWN.name.lower(), "code": int(State.UNKNOWN), "fault": moment.fault}
            return _json(unknown, 503)
        works = moment.health.state in {State.FINE, State.DEGRADED}
        return _json(moment.health.as_json(), 200 if works else 503)

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        body, media_type = await self._exposition.value()
        return Response(body, headers={"Content-Type": media_type})

    # Who asks

    async def session(self, request: Request) -> Response:
        """Whether this browser is logged in, and if so the value that its requests to act carry."""
        session, may_read = self._session(request), self._may_read(request)
        folder = self.directory if may_read else "DIR"  # a path is no stranger's business
        return _json(
            {
                "logged_in": session is not None,
                "csrf": None if session is None else session.csrf,
                "may_read": may_read,
                "token_command": f"ternbus aggregator dashboard-token {folder}",
            }
        )

    async def login(self, request: Request) -> Response:
        """Begin a session by the token."""
        peer = _peer(request)
        token = Asked(await _body(request)).text("token")
        try:
            is_right = self.sessions.is_token(token, peer)
        except TooManyError:
            self.audit.refused_login(peer, "too many tries")
            raise
        if not is_right:
            self.audit.refused_login(peer, "a wrong token")
            raise HTTPException(403, "this is not the token")
        cookie, session = self.sessions.begin()
        self.audit.note(_who(request, session), "login", "", "logged in")
        answer = _json({"csrf": session.csrf})
        is_secure = request.headers.get("origin", "").startswith("https:")  # behind a proxy with TLS
        answer.set_cookie(
            self._cookie, cookie, max_age=int(LIFE_S), httponly=True, samesite="strict", secure=is_secure, path="/"
        )
        return answer

    async def logout(self, request: Request) -> Response:
        self._acting_session(request)
        self.sessions.end(request.cookies.get(self._cookie, ""))
        answer = _json({})
        answer.delete_cookie(self._cookie, path="/", httponly=True, samesite="strict")
        return answer

    @property
    def _cookie(self) -> str:
        """Browsers share cookies among the ports of a host."""
        return f"ternbus-{self.port}"

    def _session(self, request: Request) -> Session | None:
        return self.sessions.find(request.cookies.get(self._cookie, ""))

    def _may_read(self, request: Request) -> bool:
        return not self.is_private or self._session(request) is not None

    def _readable(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler for those who may read; a program shows the token itself, as `Authorization: Bearer`."""

        async def checked(request: Request) -> Response:
            if not self._may_read(request):
                if not (shown := _bearer(request)):
                    raise HTTPException(401, "log in first", {"WWW-Authenticate": "Bearer"})
                if not self.sessions.is_bearer(shown, _peer(request)):
                    raise HTTPException(403, "this is not the token")
            return await handler(request)

        return checked

    def _acting_session(self, request: Request) -> Session:
        session = self._session(request)
        if session is None:
            raise HTTPException(401, "log in first")
        if not session.is_csrf(request.headers.get("x-csrf-token", "")):
            raise HTTPException(403, "the request lacks the page's token: load the page again")
        return session

    # Acting

    async def records(self, request: Request) -> Response:
        """The last actions, the newest first."""
        if self._session(request) is None:
            raise HTTPException(401, "log in first")
        return _json({"records": [asdict(each) for each in self.audit.records()]})

    async def act(self, request: Request) -> Response:
        """Do one thing; it is done and on disk when this answers. A file it makes is handed out here, once."""
        name = request.path_params["name"]
        session = self._acting_session(request)
        if name not in ACTIONS:
            raise HTTPException(404, "there is no such action")
        asked, who = Asked(await _body(request)), _who(request, session)
        if self._waiting >= WAITING_MAX:
            raise HTTPException(503, "other actions are still at work: try again")
        self._waiting += 1
        try:
            async with self._acting:
                done = await asyncio.to_thread(actions.perform, self.directory, name, asked)
        except (FederationError, OSError) as error:
            why = sentence(error, self.directory) if isinstance(error, OSError) else error
            self.audit.note(who, name, asked.about(), f"refused: {why}", done=False)
            raise
        finally:
            self._waiting -= 1
        self.audit.note(who, name, asked.about(), done.text)
        return _json({"text": done.text, "file": done.file, "content": done.content.decode()})

    async def finish(self) -> None:
        """Wait until what was begun is done."""
        async with self._acting:
            return


class _Events(Response):
    """Server-sent events until the viewer is gone; its place is free at that moment."""

    def __init__(self, stream: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        about = {"X-Accel-Buffering": "no"}  # or nginx keeps them
        async with aclosing(self._stream):
            await StreamingResponse(self._stream, media_type="text/event-stream", headers=about)(scope, receive, send)


def _json(value: Any, status: int = 200) -> Response:
    content = json.dumps(summary.finite(value), allow_nan=False).encode()
    return Response(content, status, media_type="application/json")


def _peer(request: Request) -> str:
    return "" if request.client is None else request.client.host


def _bearer(request: Request) -> str:
    """The token that a program shows; empty if it shows none."""
    shown = request.headers.get("authorization", "")
    return shown.removeprefix(BEARER) if shown.startswith(BEARER) else ""


def _who(request: Request, session: Session) -> str:
    return f"{_peer(request)}, session {session.name}"


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 19 else default


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request, whose length the guard has checked."""
    try:
        content = await asyncio.wait_for(request.body(), BODY_WITHIN_S)
    except TimeoutError as error:
        raise HTTPException(408, "the request came too slowly", {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the request was cut") from error
    with suppress(ValueError, RecursionError):
        found = json.loads(content or b"{}")
        if isinstance(found, dict):
            return found
    raise HTTPException(400, "send a JSON object")
