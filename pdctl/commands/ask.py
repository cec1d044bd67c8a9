"""`pdctl ask`: send one prompt through the proxy and stream the answer to stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pdctl import console
from pdctl.commands.common import FileOption, ServiceOption, control, find_service
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    import ssl

    import httpx

_TIMEOUT_S = 600


def ask(
    prompt: str = typer.Argument(..., help="Text to complete."),
    max_tokens: int = typer.Option(64, "--max-tokens", min=1, help="Maximum number of tokens to generate."),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="Sampling temperature; 0 is greedy."),
    file: Path | None = FileOption,
    service: str | None = ServiceOption,
    api_key: str | None = typer.Option(
        None, envvar="PDCTL_API_KEY", help="API key, if the service requires one.", show_envvar=True
    ),
) -> None:
    """Complete a text through the proxy and print the answer as it arrives."""
    import httpx

    status = control(find_service(service, file)).status(measurements=False)
    if status.nodes and not status.proxy_urls:
        raise PdctlError("no node of the cluster runs a proxy", "see: pdctl status")
    body = {
        "model": status.served_model_name,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
    }
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.stream(
            "POST",
            f"{status.proxy_url}/v1/completions",
            json=body,
            headers=headers,
            timeout=_TIMEOUT_S,
            trust_env=False,
            verify=_verification(status.tls_cert),
        ) as answer:
            _show(answer)
    except httpx.TransportError as failure:
        console.note("")
        raise PdctlError(f"the answer of {status.proxy_url} was cut off: {failure}", "see: pdctl status") from failure


def _verification(certificate: str) -> ssl.SSLContext | bool:
    """Trust the service's own certificate, and skip the host name check: the local address need not be in it."""
    if not certificate:
        return True
    import ssl

    try:
        context = ssl.create_default_context(cafile=certificate)
    except FileNotFoundError:
        hint = "the proxy is on another node: copy its certificate to that path, or ask on that node"
        raise PdctlError(f"{certificate}, the proxy's certificate, is not on this machine", hint) from None
    context.check_hostname = False
    return context


def _show(answer: httpx.Response) -> None:
    if answer.status_code != 200:
        raise PdctlError(f"the service answered {answer.status_code}: {_message(answer.read())}")
    for line in answer.iter_lines():
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
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
