"""The proxy dies, and its clients see a pause: every byte of every answer is that of a quiet run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Run, Service, pid_of, running, single, temporary_run
from tests.takeover.__main__ import checks, serving
from tests.takeover.clients import Asked, Connection, Cut, Pace, completions
from tests.takeover.kills import clients_of, kill_again_and_again, supervisor_descriptors
from tests.takeover.plants import planted

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def service(module_run: Run, tiny_model: Path) -> Iterator[Service]:
    with serving(module_run, tiny_model) as found:
        yield found


def took_over(service: Service) -> list[dict[str, object]]:
    return [json.loads(line) for line in service.run.cli("events").stdout.splitlines() if '"took_over"' in line]


def address(service: Service) -> tuple[str, int]:
    host, port = service.url.removeprefix("http://").split(":")
    return host, int(port)


def test_kills_under_mixed_clients(service: Service) -> None:
    descriptors = supervisor_descriptors(service)
    outcome = asyncio.run(kill_again_and_again(service, kills=4, count=8, with_chats=True))
    held = checks(service, outcome, descriptors)
    assert outcome.clients is not None
    assert all(is_true for _, is_true in held), (held, outcome.clients.tally.said)
    assert outcome.kills == 4


def test_a_restart_on_purpose_cuts_nothing(service: Service) -> None:
    asked, before = completions()["long"], service.process("proxy")

    async def work() -> tuple[bytes, bytes]:
        async with Connection(address(service), Pace()) as quiet, Connection(address(service), Pace()) as connection:
            await quiet.send(asked.data)
            expected = (await quiet.answer()).compared(asked)
            await connection.send(asked.data)
            await connection._read()
            done = await asyncio.to_thread(service.run.cli, "restart", "proxy")
            assert done.returncode == 0, done.stderr
            return expected, (await connection.answer()).compared(asked)

    expected, found = asyncio.run(work())
    assert found == expected
    after = service.restarted(before)
    assert after.last_exit is not None
    assert after.last_exit.code == 0
    assert took_over(service)[-1]["cut"] == 0


def test_a_translated_stream_ends_with_a_clear_error(service: Service) -> None:
    """The state of its events is not noted."""
    body = {"model": "m", "max_tokens": 400, "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    asked, before = Asked("messages", "/v1/messages", body), service.process("proxy")

    async def work() -> bytes:
        async with Connection(address(service), Pace()) as connection:
            await connection.send(asked.data)
            await connection._read()
            os.kill(pid_of(before), signal.SIGKILL)
            return (await connection.answer()).body

    assert b"the proxy was restarted, and answers of this API cannot be continued" in asyncio.run(work())
    service.restarted(before)


def test_apply_of_a_setting_that_needs_another_process_cuts_nothing(tiny_model: Path) -> None:
    asked = completions()["long"]
    with temporary_run() as run, serving(run, tiny_model) as service:
        async def work() -> tuple[bytes, bytes]:
            async with Connection(address(service), Pace()) as quiet, Connection(address(service), Pace()) as stream:
                await quiet.send(asked.data)
                expected = (await quiet.answer()).compared(asked)
                await stream.send(asked.data)
                await stream._read()
                text = (run.folder / "pdctl.toml").read_text()
                run.write(text.replace("takeover = true", "takeover = true\ntakeover_slots = 600"))
                done = await asyncio.to_thread(run.cli, "apply")
                assert done.returncode == 0, done.stderr
                return expected, (await stream.answer()).compared(asked)

        expected, found = asyncio.run(work())
        assert found == expected
        # On a slow machine the answer may have been complete by then: its connection went on all the same.
        assert took_over(service)


@pytest.mark.parametrize(
    "fault", ["socket-first", *(pytest.param(name, marks=pytest.mark.slow) for name in ("off-by-one", "no-keeper"))]
)
def test_planted_faults_are_found(tiny_model: Path, fault: str) -> None:
    with planted(fault), temporary_run() as run, serving(run, tiny_model) as service:
        outcome = asyncio.run(kill_again_and_again(service, kills=10, count=14, with_chats=False))
    assert outcome.clients is not None
    assert outcome.clients.tally.cut + outcome.clients.tally.wrong > 0


def test_no_client_notices_a_death_between_accept_and_the_duplicate(tiny_model: Path) -> None:
    with planted("dies-at-accept"), temporary_run() as run, serving(run, tiny_model) as service:
        before = service.process("proxy").restarts
        clients = clients_of(service, with_chats=False)

        async def ask(number: int) -> None:
            asked = clients.requests[("whole", "stream")[number % 2]]
            async with Connection(clients.address, Pace()) as connection:
                await connection.send(asked.data)
                clients.check(asked, await connection.answer())

        async def work() -> None:
            await clients.learn()
            for begin in range(0, 20, 4):
                await asyncio.gather(*map(ask, range(begin, begin + 4)))

        asyncio.run(work())
        assert clients.tally.answers == 20
        service.idle()
        assert service.process("proxy").restarts >= before + 2


def test_connections_without_a_slot_end_with_the_proxy_and_are_counted() -> None:
    asked = completions()["stream"]

    async def work(service: Service) -> None:
        # The first one takes the slot, unless a connection of the supervisor has it.
        async with Connection(address(service), Pace()), Connection(address(service), Pace()) as connection:
            await connection.send(asked.data)
            await connection._read()
            assert (found := service.process("proxy").takeover) is not None
            assert (found.slots, found.kept) == (1, 1)
            assert found.uncovered > 0
            os.kill(pid_of(service.process("proxy")), signal.SIGKILL)
            await connection.answer()

    with (
        temporary_run() as run,
        running(run, single(extra="takeover = true\ntakeover_slots = 1")) as service,
        pytest.raises(Cut),
    ):
        asyncio.run(work(service))
