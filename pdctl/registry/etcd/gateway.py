"""Calls of etcd's JSON gateway with httpx: which member, how long, which errors. Everything of httpx ends here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Never

import httpx
import msgspec

from pdctl.net.http_client import explained
from pdctl.net.identity import ContextFactory
from pdctl.registry import Behind, Refused, Unavailable
from pdctl.registry.etcd.members import Members
from pdctl.registry.etcd.messages import Answer, Empty, Failure, Message, TokenAnswer, WatchAnswer, decoded

# An etcd that is well answers in 2 ms, and after an election in a second.
CALL_S = 1.0
# A watch never tells that it is deaf (etcd #8980): its member is asked this often, and two missed answers end it.
_PROOF_EVERY_S = 1.0
_PROOFS_MISSED = 2
_LONGEST_LINE = 16 * 1024 * 1024
_STATUS = "/v3/maintenance/status"
# gRPC's codes: what the user can mend, with a hint.
_NOT_FOUND = 5
_REFUSALS = {
    3: "etcd says that the call is wrong: check its user, its password and its version (3.4 to 3.7)",
    7: "give the user of [cluster] a role that may read and write the prefix /pdctl/",
    8: "compact and defragment etcd, or raise its --quota-backend-bytes",
    9: "check that access control of etcd is on when [cluster] names a user",
    16: "check user and password of [cluster], or its certificate",
}


class NotFound(Exception):
    """etcd does not know the lease."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of etcd's own access control."""

    user: str
    password: str


class Gateway:
    """A pool of connections to all members. `tls` gives one context, always the same."""

    def __init__(
        self, urls: list[str], tls: ContextFactory | None = None, credentials: Credentials | None = None
    ) -> None:
        self._members = Members(urls, random.randrange(len(urls)))  # noqa: S311 - spreading, no secret
        self._client = httpx.AsyncClient(verify=tls() if tls is not None else True, trust_env=False)
        self._tls = tls
        self._credentials = credentials
        self._token: str | None = None

    async def call(self, path: str, message: Message, kind: type[Answer], repeat: bool = True) -> Answer:
        """POST `message`, and ask the next member when one does not answer in time.

        `repeat`: doing it twice does no harm. Else only a call that never reached a member is repeated. Raises
        Unavailable, Refused, NotFound.
        """
        failure = ""
        for _attempt in range(len(self._members)):
            url = self._members.current
            try:
                return await self._signed(url, path, message, kind)
            except Unavailable as unavailable:
                failure = str(unavailable)
                self._members.failed(url)
                if not repeat and not isinstance(unavailable, _NotReached):
                    break
        raise Unavailable(failure)

    async def stream(self, path: str, message: Message, tell: Callable[[WatchAnswer], None]) -> Never:
        """Tell each line of a watch at one member, for ever.

        Raises Unavailable when it ends, or when its member is silent; Refused; and Behind if `tell` does.
        """
        url = self._members.current
        try:
            # A watch does not sign in by itself, and would be refused with a token that etcd has forgotten.
            await self._signed(url, _STATUS, {}, Empty)
            raise await _first_failure(self._read(url, path, message, tell), self._prove(url))
        except Unavailable:
            self._members.failed(url)
            raise

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _signed(self, url: str, path: str, message: Message, kind: type[Answer]) -> Answer:
        """One call. A token that etcd has forgotten, as it does after five minutes, is replaced once."""
        known = self._token
        if self._credentials is None:
            return await self._post(url, path, message, kind)
        if known is None:
            await self._authenticate(url, self._credentials)
        try:
            return await self._post(url, path, message, kind)
        except Refused:
            if known is None:
                raise
            await self._authenticate(url, self._credentials)
            return await self._post(url, path, message, kind)

    async def _authenticate(self, url: str, who: Credentials) -> None:
        self._token = None
        asked: Message = {"name": who.user, "password": who.password}
        self._token = (await self._post(url, "/v3/auth/authenticate", asked, TokenAnswer)).token

    async def _post(self, url: str, path: str, message: Message, kind: type[Answer]) -> Answer:
        body = msgspec.json.encode(message)
        if self._tls is not None:
            self._tls()  # the same context: it follows a renewed certificate when it is asked for
        before = _cancels()
        try:
            async with asyncio.timeout(CALL_S):
                answer = await self._client.post(url + path, content=body, headers=self._headers(), timeout=CALL_S)
        except (httpx.ConnectError, httpx.ConnectTimeout) as failure:
            _heed_cancel(before)
            raise _NotReached(f"etcd at {url} is not reached: {failure or type(failure).__name__}") from failure
        except (httpx.HTTPError, TimeoutError, OSError) as failure:
            _heed_cancel(before)
            # An OSError of ssl comes as it is: with TLS 1.3 a server refuses a certificate when it is first read from.
            told = explained(failure) or type(failure).__name__
            raise Unavailable(f"etcd at {url} does not answer: {told}") from failure
        if answer.status_code != httpx.codes.OK:
            raise _failure(url, answer.status_code, answer.content)
        try:
            return decoded(answer.content, kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise Unavailable(f"{url} does not answer as etcd does: {failure}") from failure

    async def _read(self, url: str, path: str, message: Message, tell: Callable[[WatchAnswer], None]) -> Never:
        headers = {**self._headers(), "Grpc-Metadata-hasleader": "true"}
        timeout = httpx.Timeout(CALL_S, read=None)
        body, before = msgspec.json.encode(message), _cancels()
        try:
            call = self._client.stream("POST", url + path, content=body, headers=headers, timeout=timeout)
            async with call as answer:
                if answer.status_code != httpx.codes.OK:
                    raise _failure(url, answer.status_code, await answer.aread())
                await _each_line(url, answer, tell)
        except (httpx.HTTPError, OSError) as failure:
            _heed_cancel(before)
            raise Unavailable(f"the watch at {url} broke: {failure or type(failure).__name__}") from failure
        raise Unavailable(f"etcd at {url} ended the watch")

    async def _prove(self, url: str) -> Never:
        missed = 0
        while True:
            await asyncio.sleep(_PROOF_EVERY_S)
            try:
                await self._signed(url, _STATUS, {}, Empty)
                missed = 0
            except Unavailable:
                missed += 1
                if missed == _PROOFS_MISSED:
                    raise

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token} if self._token is not None else {}


class _NotReached(Unavailable):
    """No connection: nothing can have happened."""


def _cancels() -> int:
    """How often this task was told to end."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _heed_cancel(before: int) -> None:
    """End a task that was told to end meanwhile: a connection that breaks at that moment takes the word away."""
    if _cancels() > before:
        raise asyncio.CancelledError


async def _first_failure(*works: Coroutine[None, None, Never]) -> Unavailable | Behind | Refused:
    """What ends the first of these, which else run for ever. The others are cancelled.

    Failures are values here: a task group that is told of one while it is cancelled raises it, and forgets that it was
    cancelled (Python before 3.13). A connection that breaks because its read is cancelled is such a failure.
    """
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(_failure_of(work)) for work in works]
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            task.cancel()
    return next(iter(done)).result()


async def _failure_of(work: Coroutine[None, None, Never]) -> Unavailable | Behind | Refused:
    try:
        await work
    except (Unavailable, Behind, Refused) as failure:
        return failure


async def _each_line(url: str, answer: httpx.Response, tell: Callable[[WatchAnswer], None]) -> None:
    rest = b""
    async for data in answer.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            raise Unavailable(f"etcd at {url} sent a line of more than {_LONGEST_LINE} bytes")
        for line in lines:
            try:
                tell(decoded(line, WatchAnswer))
            except (msgspec.DecodeError, UnicodeDecodeError) as failure:
                raise Unavailable(f"{url} does not answer as etcd does: {failure}") from failure


def _failure(url: str, status: int, body: bytes) -> Unavailable | Refused | NotFound:
    """What an answer other than 200 means. Text that is not JSON comes from etcd's gateway or a proxy before it."""
    try:
        said = decoded(body, Failure)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = Failure(0, body[:200].decode(errors="replace").strip())
    text = f"etcd at {url} refuses ({status}): {said.message}"
    if said.code == _NOT_FOUND:
        return NotFound(text)
    if said.code in _REFUSALS:
        return Refused(text, _REFUSALS[said.code])
    return Unavailable(text)
