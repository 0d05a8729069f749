"""What stands before every request: which host it is for, where it comes from, and how answers are marked."""

from collections.abc import Collection
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS: Final = frozenset({"GET", "HEAD", "POST"})
BODY_BYTES_MAX: Final = 4096
PATH_CHARS_MAX: Final = 200  # no address of ours is longer, and none becomes a number of thousands of digits
SECURED: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses what no page of ours sends: a foreign Host (DNS rebinding), a foreign Origin, a large body."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        """``hosts`` are names and addresses by which the dashboard is reached, in lower case, without a port."""
        self._app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURED)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, secured)
        else:
            status, why = refusal
            # what is left of a body is not read
            await JSONResponse({"error": why}, status, {"Connection": "close"})(scope, receive, secured)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_known(host, scope):
            return 421, f"no dashboard of this name: add --dashboard-host {_name(host) or 'NAME'} if it is yours"
        if len(scope["path"]) > PATH_CHARS_MAX:
            return 414, "there is no address as long"
        if scope["method"] not in METHODS:
            return 405, "GET and POST only"
        return self._refusal_of_post(headers, host) if scope["method"] == "POST" else None

    def _refusal_of_post(self, headers: Headers, host: str) -> tuple[int, str] | None:
        origin = urlsplit(headers.get("origin", ""))
        if origin.scheme not in {"http", "https"} or origin.netloc.lower() != host.lower():
            return 403, "this request does not come from the dashboard's own page"
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return 403, "this request comes from another site"
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "send JSON"
        length = headers.get("content-length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 9 or int(length) > BODY_BYTES_MAX:
            return 413, f"send at most {BODY_BYTES_MAX} bytes, with their length"
        return None

    def _is_known(self, host: str, scope: Scope) -> bool:
        """A name that was given, or the very address that the connection came in by: rebinding needs a name."""
        name = _name(host)
        return bool(name) and (name in self._hosts or _same(name, scope.get("server")))


def _name(host: str) -> str:
    """The name or address in a Host header, in lower case; empty where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".") if "@" not in host and "/" not in host else ""
    except ValueError:
        return ""


def _same(name: str, server: tuple[str, int | None] | None) -> bool:
    try:
        if server is None:
            return False
        own = ip_address(server[0])
        return ip_address(name) == (getattr(own, "ipv4_mapped", None) or own)
    except ValueError:
        return False
