"""Joining a cluster over the network: the server beside the CA, and the machine that joins.

The machine first reads the CA's certificate and compares it with the fingerprint in its token; only then, over a
connection that this CA vouches for, does it show the token's secret. A node renews with the certificate that it has.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Never, TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdctl.commands.cluster.authority import checked_addresses, new_key
from pdctl.commands.cluster.folder import JOINED, CaFolder, Joined
from pdctl.commands.cluster.tokens import Token, Tokens
from pdctl.errors import PdctlError
from pdctl.net.http_client import ConnectionPool, Unreachable
from pdctl.net.http_client import Response as Answer
from pdctl.net.identity import PEER, Who
from pdctl.net.identity.contexts import TellsWhy
from pdctl.net.identity.files import write_file, write_identity
from pdctl.net.prompt_protocol import PromptProtocol
from pdctl.net.serving import Server, close_connections, listen_tcp

Message = TypeVar("Message", bound=msgspec.Struct)

# The server's own certificate is made again so often, and lives longer. Days.
_OWN_EVERY, _OWN_LIFE = 1.0, 3.0
# After a failure, in seconds.
_OWN_AGAIN_S = 3600.0
_CALL_S = 10.0
_MOST_BYTES = 16 * 1024
_AT_ONCE = 64
_DAY_S = 86400.0


class JoinCall(msgspec.Struct, frozen=True):
    """A machine joins. `request`: for a certificate of its key, PEM."""

    id: str
    secret: str
    request: str


class RenewCall(msgspec.Struct, frozen=True):
    """A node that has a certificate wants the next one."""

    request: str


class Certified(msgspec.Struct, frozen=True):
    """The answer, PEM. `secret`: of the service, for a machine that joins."""

    node: str
    certificate: str
    ca: str
    secret: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """Why not."""

    reason: str


# -- beside the CA -----------------------------------------------------------------------------------------


class JoinServer:
    """`say` is called for each node that was certified or refused."""

    def __init__(self, ca: CaFolder, days: float, say: Callable[[str], None]) -> None:
        self._ca = ca
        self._days = days
        self._say = say
        self._tokens = Tokens(ca.folder)

    async def run(self, host: str, port: int, ready: Callable[[int], None] = lambda _: None) -> Never:
        """Serve at an address of this machine until cancelled. Raises PdctlError."""
        checked_addresses((host,))
        try:
            listener = listen_tcp(host, port)
        except OSError as failure:
            raise PdctlError(f"{host}:{port} cannot be listened on: {failure.strerror}") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode, context.sslobject_class = ssl.CERT_OPTIONAL, TellsWhy
        context.load_verify_locations(cadata=self._ca.authority.pem.decode())
        self._certify_own(context, host)
        config = uvicorn.Config(
            self._app(), log_level="warning", access_log=False, lifespan="off", loop="none", http=PromptProtocol,
            ws="none", server_header=False, proxy_headers=False, limit_concurrency=_AT_ONCE, timeout_keep_alive=5,
            ssl_context_factory=lambda *_: context,
        )  # fmt: skip
        ready(listener.getsockname()[1])
        server = Server(config)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._renew_own(context, host))
                await server.serve(sockets=[listener])
        finally:
            await close_connections(server)
            listener.close()
        raise AssertionError("it serves until it is cancelled")

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/ca", self._show_ca),
                Route("/join", _bounded(self._join), methods=["POST"]),
                Route("/renew", _bounded(self._renew), methods=["POST"]),
            ],
            exception_handlers={PdctlError: self._refuse},
        )

    async def _show_ca(self, _: Request) -> Response:
        return Response(self._ca.authority.pem, media_type="application/x-pem-file")

    async def _join(self, request: Request) -> Response:
        call = await _decoded(request, JoinCall)
        kept = self._tokens.check(call.id, call.secret, time.time())
        addresses = kept.addresses or (_caller(request),)
        # A request that cannot be certified leaves the token as it is.
        certificate = self._ca.authority.certify(call.request.encode(), kept.node, addresses, self._days)
        with self._tokens.used(call.id):
            self._ca.remember(kept.node, addresses)
            secret = self._ca.secret.decode()
        self._say(f"node {kept.node} joined from {_caller(request)}, with {', '.join(addresses)}")
        return self._certified(kept.node, certificate, secret)

    async def _renew(self, request: Request) -> Response:
        call = await _decoded(request, RenewCall)
        who: Who | None = request.scope.get(PEER)
        if who is None or who.service != self._ca.authority.service:
            raise PdctlError("only a node of this service may renew its certificate: this call shows none")
        certificate = self._ca.renew(call.request.encode(), who.node, self._days)
        self._say(f"node {who.node} renewed its certificate from {_caller(request)}")
        return self._certified(who.node, certificate)

    def _certified(self, node: str, certificate: bytes, secret: str = "") -> Response:
        made = Certified(node, certificate.decode(), self._ca.authority.pem.decode(), secret)
        return Response(msgspec.json.encode(made), media_type="application/json")

    async def _refuse(self, request: Request, failure: Exception) -> Response:
        self._say(f"refused {_caller(request)}: {failure}")
        return Response(msgspec.json.encode(Refusal(str(failure))), 403, media_type="application/json")

    async def _renew_own(self, context: ssl.SSLContext, host: str) -> Never:
        wait_s = _OWN_EVERY * _DAY_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                self._certify_own(context, host)
                wait_s = _OWN_EVERY * _DAY_S
            except PdctlError as failure:
                # The one in use has not ended: a full disk now must not keep nodes from renewing.
                self._say(f"{failure}; again in {_OWN_AGAIN_S / 60:g} minutes")
                wait_s = _OWN_AGAIN_S

    def _certify_own(self, context: ssl.SSLContext, host: str) -> None:
        """Raises PdctlError."""
        key = new_key()
        certificate = self._ca.authority.certify_server(key.request, host, _OWN_LIFE)
        # ssl reads certificates from files only; this one is readable by its owner only, and gone at once.
        try:
            with tempfile.NamedTemporaryFile(dir=self._ca.folder, prefix=".own.") as file:
                file.write(key.pem + certificate)
                file.flush()
                context.load_cert_chain(file.name)
        except OSError as failure:
            message = f"the certificate of this server cannot be written in {self._ca.folder}: {failure.strerror}"
            raise PdctlError(message) from failure


def _bounded(act: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def acted(request: Request) -> Response:
        try:
            async with asyncio.timeout(_CALL_S):
                return await act(request)
        except TimeoutError:
            raise PdctlError(f"the call did not arrive within {_CALL_S:g} s") from None

    return acted


async def _decoded(request: Request, kind: type[Message]) -> Message:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise PdctlError(f"the call is larger than {_MOST_BYTES} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise PdctlError(f"the call is not understood: {failure}") from None


def _caller(request: Request) -> str:
    return request.client.host if request.client is not None else "?"


# -- the machine that joins --------------------------------------------------------------------------------


async def join(host: str, port: int, token: Token, folder: Path, secret_file: Path) -> str:
    """Join with a token: write the node's folder and the service's secret. Returns its name. Raises PdctlError."""
    ca = await _believed_ca(host, port, token)
    key = new_key()
    call = JoinCall(token.id, token.secret, key.request.decode())
    made = await _certified(host, port, ca, "/join", call, None)
    write_file(secret_file, made.secret.encode())
    write_file(folder / JOINED, msgspec.json.encode(Joined(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")))
    # The certificate last: a machine that was stopped before has not joined.
    _keep(folder, made, ca, key.pem)
    return made.node


async def renew(host: str, port: int, folder: Path) -> None:
    """Renew the certificate in a node's folder, with the one that is there. Raises PdctlError."""
    try:
        ca = (folder / "ca.pem").read_bytes()
    except OSError as failure:
        hint = "join again, or beside the CA: pdctl cluster certify"
        raise PdctlError(f"{folder} has no certificate of the CA: {failure.strerror}", hint) from None
    key = new_key()
    made = await _certified(host, port, ca, "/renew", RenewCall(key.request.decode()), folder)
    _keep(folder, made, ca, key.pem)


def _keep(folder: Path, made: Certified, ca: bytes, key: bytes) -> None:
    """The CA stays the one that the token named: an answer cannot bring another one."""
    write_identity(folder, ca, made.certificate.encode(), key)


async def _believed_ca(host: str, port: int, token: Token) -> bytes:
    """The certificate of the CA, if it is the one that the token names. Raises PdctlError."""
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    pem = (await _asked(host, port, nobody, "GET", "/ca", b"")).body
    try:
        found = ssl.PEM_cert_to_DER_cert(pem.decode())
    except (ValueError, UnicodeDecodeError):
        raise PdctlError(f"{host}:{port} shows no certificate of a CA") from None
    if hashlib.sha256(found).hexdigest() != token.ca:
        message = f"the CA at {host}:{port} is not the one of the token: nothing was sent to it"
        raise PdctlError(message, "check the address; somebody may answer in its place")
    return pem


async def _certified(
    host: str, port: int, ca: bytes, path: str, call: msgspec.Struct, folder: Path | None
) -> Certified:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca.decode())
        if folder is not None:
            context.load_cert_chain(folder / "node.pem", folder / "node.key")
    except (OSError, ValueError) as failure:
        raise PdctlError(f"the certificates cannot be used: {failure}") from None
    answer = await _asked(host, port, context, "POST", path, msgspec.json.encode(call))
    try:
        if answer.status != 200:
            raise PdctlError(f"{host}:{port} refuses: {msgspec.json.decode(answer.body, type=Refusal).reason}")
        return msgspec.json.decode(answer.body, type=Certified)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise PdctlError(f"{host}:{port} does not answer as pdctl cluster serve does") from None


async def _asked(host: str, port: int, context: ssl.SSLContext, method: str, path: str, body: bytes) -> Answer:
    pool = ConnectionPool(host, port, tls=lambda: context)
    try:
        return await pool.request(method, path, b"content-type: application/json\r\n", body, _CALL_S)
    except Unreachable as failure:
        raise PdctlError(str(failure), "beside the CA runs: pdctl cluster serve DIR --listen HOST:PORT") from None
    finally:
        pool.close()
