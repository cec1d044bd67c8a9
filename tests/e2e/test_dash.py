"""The live page of a real service, in a real browser: a killed engine, a failover, a restart by a button."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.chromium import BINARY, browser
from tests.service import Run, Service, free_port, pid_of, running, topology

pytestmark = pytest.mark.e2e
needs_browser = pytest.mark.skipif(BINARY is None, reason="NOT TESTED: no chromium")

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
PORT = free_port()


@pytest.fixture(scope="module")
def service(module_run: Run) -> Iterator[Service]:
    with running(module_run, topology(extra=f'[dashboard]\nlisten = "127.0.0.1:{PORT}"')) as found:
        yield found


def link(service: Service, *options: str) -> str:
    return service.run.cli("dash", *options, check=True).stdout.strip()


def tone(name: str) -> str:
    return f"document.querySelector('[data-name={name}]')?.dataset.tone"


def test_the_link(service: Service) -> None:
    """The page is where the topology says. Its files need no token; everything of the service does."""
    page, _, token = link(service).partition("#")
    assert page == f"http://127.0.0.1:{PORT}/"
    assert token != link(service, "--write").partition("#")[2]
    assert httpx.get(page, trust_env=False).headers["content-type"].startswith("text/html")
    assert httpx.get(f"{page}api/exits", trust_env=False).status_code == 401
    headers = {"authorization": f"Bearer {token}"}
    assert httpx.get(f"{page}api/exits", headers=headers, trust_env=False).status_code == 200
    other = {**headers, "origin": "https://evil.example"}
    assert httpx.get(f"{page}api/exits", headers=other, trust_env=False).status_code == 403
    refused = httpx.post(f"{page}api/processes/decode-0/restart", headers=headers, trust_env=False)
    assert refused.status_code == 403
    assert service.process("decode-0").restarts == 0


def test_another_address_while_it_is_open(service: Service) -> None:
    done = service.run.cli("dash", "--listen", "127.0.0.1:1")
    assert done.returncode == 1
    assert "pdctl dash --stop" in done.stderr
    assert "0.0.0.0" in service.run.cli("dash", "--listen", "0.0.0.0:8099").stderr


@needs_browser
def test_a_killed_engine_is_red_within_two_seconds_and_green_again(service: Service) -> None:
    service.healthy()
    before = service.process("decode-0")
    with browser() as page:
        page.open(link(service), 1440)
        page.until(f"{tone('decode-0')} === 'good'")
        # The page itself notes the time, so that a slow test does not count.
        page.evaluate(
            "new MutationObserver(() => { window.redAt ??= document.querySelector('[data-name=decode-0]').dataset.tone"
            " === 'bad' ? Date.now() : undefined; }).observe(document.querySelector('[data-name=decode-0]'), "
            "{attributes: true, attributeFilter: ['data-tone']})"
        )
        killed_at = time.time()
        os.kill(pid_of(before), signal.SIGKILL)
        red_at = page.until("window.redAt") / 1000
        assert red_at - killed_at < 2.0
        page.until("document.querySelector('#exit-list')?.textContent.includes('killed by SIGKILL')")
        page.until(f"{tone('decode-0')} === 'good'", 300)
        assert page.complaints == []
    service.restarted(before)


@needs_browser
def test_a_stream_that_met_a_death(service: Service) -> None:
    """The request's timeline has the failed try, and the figures have its tokens."""
    service.healthy()
    before = service.process("decode-0")
    with browser() as page:
        page.open(link(service), 1440)
        page.until(f"{tone('decode-0')} === 'good'")
        page.evaluate("document.querySelector('#requests').scrollIntoView()")
        service.stream(PROMPT, lambda: os.kill(pid_of(before), signal.SIGKILL), max_tokens=200, ignore_eos=True)
        page.until("document.querySelector('#request-table tbody')?.textContent.includes('1 failover')")
        page.evaluate("document.querySelector('tr[data-tone=busy] button').click()")
        assert "decode-0" in page.evaluate("document.querySelector('.notes').textContent")
        assert page.evaluate("document.querySelectorAll('.lanes .phase[data-phase=failed]').length") == 1
        assert page.evaluate("document.querySelectorAll('.lanes .phase[data-phase=decode]').length") == 1
        page.until("document.querySelector('#chart-ttft .legend b').textContent.includes('s')")
        service.restarted(before)
        page.until("document.querySelector('#links td:nth-child(3)').textContent === 'shm'")
    service.idle()


@needs_browser
def test_a_restart_by_a_button(service: Service) -> None:
    service.healthy()
    before = service.process("prefill-0")
    with browser() as page:
        page.open(link(service, "--write"), 1024, dark=True)
        page.until(f"{tone('prefill-0')} === 'good'")
        page.evaluate("document.querySelector('[data-name=prefill-0] .card-name').click()")
        page.evaluate("document.querySelector('#details-actions button').click()")
        assert service.process("prefill-0").pid == before.pid
        page.evaluate("document.querySelector('#details-actions .strong').click()")
        page.until("document.querySelector('#told').textContent.includes('begun')")
        after = service.restarted(before)
        page.until(f"{tone('prefill-0')} === 'good'")
    assert after.pid != before.pid
    assert "restart requested" in service.run.cli("events").stdout


def test_it_is_closed_and_opened_again(service: Service) -> None:
    assert "is closed" in service.run.cli("dash", "--stop", check=True).stderr
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{PORT}/", trust_env=False)
    assert link(service).startswith(f"http://127.0.0.1:{PORT}/#")
    assert httpx.get(f"http://127.0.0.1:{PORT}/", trust_env=False).status_code == 200
