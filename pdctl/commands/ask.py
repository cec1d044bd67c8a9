"""`pdctl ask`: one prompt through the proxy, its answer streamed to stdout."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, call, find_service
from pdctl.errors import PdctlError

_TIMEOUT_S = 600


def ask(
    prompt: str = typer.Argument(..., help="The text to complete."),
    max_tokens: int = typer.Option(64, "--max-tokens", min=1, help="Tokens at most."),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0 is greedy."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
) -> None:
    """Complete a text through the proxy."""
    status = call(find_service(service, file), "GET", "/v1/status")
    body = {
        "model": status["served_model_name"],
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
    }
    url = urlsplit(status["proxy_url"])
    connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        _show(connection.getresponse())
    except (OSError, http.client.HTTPException) as failure:
        raise PdctlError(f"the proxy at {status['proxy_url']} did not answer: {failure}", "pdctl status") from failure
    finally:
        connection.close()


def _show(response: http.client.HTTPResponse) -> None:
    if response.status != 200:
        raise PdctlError(f"the service answered {response.status}: {_message(response.read())}")
    for line in response:
        data = line.strip().removeprefix(b"data: ")
        if not data or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            console.out()
            raise PdctlError(f"the answer was cut off: {event['error']['message']}")
        console.out(event["choices"][0]["text"] if event["choices"] else "", end="")
    console.out()


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
