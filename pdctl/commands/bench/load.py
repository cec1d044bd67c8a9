"""The load of a `pdctl bench` verb: its options, and how they become requests with send times."""

from __future__ import annotations

import asyncio
import math
import os
import random
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from pdctl import console
from pdctl.commands.common import control, find_service, is_interactive
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdctl.bench import Asked
    from pdctl.bench.client import Endpoint, Run
    from pdctl.bench.measurements import Targets
    from pdctl.bench.workload import Vocabulary

# Below this, all gaps but one would be 0.
_LEAST_BURSTINESS = 0.01
TARGETS = ("ttft", "tpot", "e2el")


class Workload(StrEnum):
    """Source of the prompts."""

    SYNTHETIC = "synthetic"
    SHARED_PREFIX = "shared-prefix"
    FILE = "file"
    TRACE = "trace"


# Options that only some workloads use; the others refuse them.
_HEEDED_BY = {
    "path": (Workload.FILE, Workload.TRACE),
    "inputs": (Workload.SYNTHETIC, Workload.SHARED_PREFIX),
    "outputs": (Workload.SYNTHETIC, Workload.SHARED_PREFIX, Workload.FILE),
    "prefixes": (Workload.SHARED_PREFIX,),
    "prefix": (Workload.SHARED_PREFIX,),
    "speed": (Workload.TRACE,),
    "length": (Workload.TRACE,),
    "longest": (Workload.TRACE,),
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """The requests of a load and their times. Its fields become options of every verb that `takes` it."""

    workload: Annotated[Workload, typer.Option("--workload", help="Source of the prompts.")] = Workload.SYNTHETIC
    path: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Input file. Workload file: JSON lines; workload trace: Azure CSV or Mooncake JSONL."
        ),
    ] = None
    count: Annotated[
        int,
        typer.Option("-n", "--requests", min=0, help="Number of requests. Workload trace: at most this many; 0 = all."),
    ] = 100
    rate: Annotated[float, typer.Option("--rate", help="Requests per second; inf = all at once.")] = math.inf
    ramp_to: Annotated[
        float | None, typer.Option("--ramp-to", help="Change the rate linearly from --rate to this.")
    ] = None
    burstiness: Annotated[
        float, typer.Option("--burstiness", help="Burstiness of arrivals: 1 = Poisson, less = bursts, more = steady.")
    ] = 1.0
    inputs: Annotated[
        str, typer.Option("--input", help="Prompt length in tokens: 512, 100-900 or lognormal:500:0.8.")
    ] = "256"
    outputs: Annotated[str, typer.Option("--output", help="Answer length in tokens, in the same forms.")] = "64"
    prefixes: Annotated[
        int, typer.Option("--prefixes", min=1, help="Workload shared-prefix: number of different prefixes.")
    ] = 4
    prefix: Annotated[
        int, typer.Option("--prefix", min=1, help="Workload shared-prefix: length of each prefix in tokens.")
    ] = 256
    speed: Annotated[float, typer.Option("--speed", help="Workload trace: replay speed; 2 = twice as fast.")] = 1.0
    length: Annotated[float, typer.Option("--length", help="Workload trace: multiply all lengths by this.")] = 1.0
    longest: Annotated[
        int, typer.Option("--longest", min=0, help="Workload trace: limit of prompt plus answer tokens; 0 = none.")
    ] = 0
    goodput: Annotated[
        list[str], typer.Option("--goodput", help="Goodput targets in ms, such as ttft:200 tpot:50. Repeatable.")
    ] = field(default_factory=list)
    warm_up: Annotated[
        int, typer.Option("--warm-up", min=0, help="Number of requests sent before the measurement.")
    ] = 0
    seed: Annotated[int, typer.Option("--seed", help="Random seed: same seed, same requests.")] = 0

    @property
    def targets(self) -> Targets:
        """The goodput targets. Raises PdctlError."""
        return targets_of(self.goodput)

    def check(self, given: dict[str, str]) -> None:
        """Raise PdctlError for options that make no sense together. `given`: options on the command line."""
        check_rates(self.rate, self.ramp_to, self.burstiness, self.speed, self.length)
        for name, written in given.items():
            if self.workload not in _HEEDED_BY.get(name, (self.workload,)):
                hint = f"use it with --workload {' or '.join(_HEEDED_BY[name])}"
                raise PdctlError(f"{written} does nothing with --workload {self.workload}", hint)
        if "burstiness" in given and math.isinf(self.rate):
            raise PdctlError("--burstiness does nothing without --rate", "add one, such as --rate 4")
        if "speed" in given and not math.isinf(self.rate):
            raise PdctlError("--speed does nothing with --rate, which replaces the trace's times", "use one of them")

    def requests(self, words: Vocabulary) -> tuple[list[Asked], list[float]]:
        """The requests and their send times. Raises PdctlError."""
        rng = random.Random(self.seed)  # noqa: S311 - a workload, not a secret
        asked = self._asked(words, rng)
        if not asked:
            raise PdctlError("there are no requests to send", "give --requests N, or a trace with entries")
        return asked, self._times(asked, rng)

    def _asked(self, words: Vocabulary, rng: random.Random) -> list[Asked]:
        from pdctl.bench import trace
        from pdctl.bench import workload as works

        out = works.lengths(self.outputs, "--output")
        if self.workload in (Workload.FILE, Workload.TRACE):
            if self.path is None:
                raise PdctlError(f"--workload {self.workload} needs --data FILE")
            if self.workload is Workload.FILE:
                return works.from_file(self.path, out, rng)[: self.count or None]
            scale = trace.Scale(self.speed, self.length, self.count, longest=self.longest)
            return trace.read_trace(self.path, scale, words, self.seed)
        into = works.lengths(self.inputs, "--input")
        if self.workload is Workload.SHARED_PREFIX:
            return works.shared_prefix(self.count, self.prefixes, self.prefix, into, out, words, rng)
        return works.synthetic(self.count, into, out, words, rng)

    def _times(self, asked: list[Asked], rng: random.Random) -> list[float]:
        """Send times. A trace has its own, unless a rate is given."""
        from pdctl.bench import arrivals

        own = [request.at for request in asked if request.at is not None]
        if len(own) == len(asked) and math.isinf(self.rate):
            return own
        if self.ramp_to is not None:
            return arrivals.ramp(len(asked), self.rate, self.ramp_to, rng)
        return arrivals.gamma(len(asked), self.rate, self.burstiness, rng)


@dataclass(frozen=True, slots=True)
class Load(Traffic):
    """One load and the way in which it is put on a service."""

    concurrency: Annotated[
        int, typer.Option("--concurrency", min=0, help="Maximum number of concurrent requests; 0 = no limit.")
    ] = 0
    warm_up: Annotated[
        int, typer.Option("--warm-up", min=0, help="Number of requests sent before the measurement.")
    ] = 4
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--heed-eos",
            help="Ignore end-of-sequence tokens, so that answers have the full --output length.",
        ),
    ] = True
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Timeout of one request in seconds.")] = 600.0
    chat: Annotated[
        bool, typer.Option("--chat", help="Send chat requests with one message instead of completions.")
    ] = False

    def run(self, endpoint: Endpoint, asked: list[Asked], times: list[float]) -> Run:
        """Warm up, then send all requests."""
        from pdctl.bench import client

        if self.warm_up:
            console.note(f"warming up with {self.warm_up} requests ...")
            first = (asked * (self.warm_up // len(asked) + 1))[: self.warm_up]
            found = asyncio.run(client.drive(endpoint, first, [0.0] * self.warm_up, 1, lambda _: None))
            if found.was_interrupted:
                found.records.clear()
                return found
        done = asyncio.run(client.drive(endpoint, asked, times, self.concurrency, _progress(len(asked))))
        if is_interactive():
            console.note("")
        return done


def takes(**parts: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces parameters of a verb by the options of dataclasses, such as `load=Load`; the verb is
    called with instances made of them."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        options = {name: _options(kind) for name, kind in parts.items()}
        own = get_type_hints(command, include_extras=True)
        others = [
            one.replace(kind=Parameter.KEYWORD_ONLY, annotation=own[one.name])
            for one in signature(command).parameters.values()
            if one.name not in parts
        ]

        def called(**values: object) -> None:
            made = {
                name: kind(**{option.name: values.pop(option.name) for option in options[name]})
                for name, kind in parts.items()
            }
            command(**made, **values)

        every = [*(option for of_part in options.values() for option in of_part), *others]
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {one.name: one.annotation for one in every}
        called.__signature__ = Signature(every)  # type: ignore[attr-defined]  # what inspect reads
        return called

    return decorated


def _options(kind: type) -> list[Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        Parameter(
            one.name,
            Parameter.KEYWORD_ONLY,
            default=one.default_factory() if one.default_factory is not MISSING else one.default,
            annotation=hints[one.name],
        )
        for one in fields(kind)
    ]


takes_load = takes(load=Load)


def endpoint_of(
    url: str | None, model: str, key: str, ignore_eos: bool, timeout: float, chat: bool = False
) -> Endpoint:
    """Where to send requests. Defaults: the running service, and the first model it lists. Raises PdctlError.

    A service on this machine is trusted by its own certificate. Without a key, PDCTL_API_KEY is used.
    """
    from pdctl.bench import client
    from pdctl.commands.bench.watch import certificate_at

    key = key or os.environ.get("PDCTL_API_KEY", "")
    headers = f"authorization: Bearer {key}\r\n".encode() if key else b""
    fields: dict[str, object] = {"ignore_eos": True} if ignore_eos else {}
    url = url or _running()
    certificate = certificate_at(url) if url.startswith("https:") else ""
    endpoint = client.Endpoint(url, model, headers, fields, timeout, certificate, chat)
    return replace(endpoint, model=model or asyncio.run(client.models(endpoint))[0])


def _running() -> str:
    return control(find_service(None, None)).status(measurements=False).proxy_url


def targets_of(words: list[str]) -> Targets:
    """Parse targets such as `ttft:200 tpot:50`. Raises PdctlError."""
    from pdctl.bench.measurements import Targets

    found: dict[str, float] = {}
    for word in " ".join(words).split():
        name, _, limit = word.partition(":")
        try:
            found[name] = float(limit)
        except ValueError:
            found[name] = -1.0
        if name not in TARGETS or not found[name] > 0:
            raise PdctlError(f"--goodput {word!r} is not a target", f"such as ttft:200; names: {', '.join(TARGETS)}")
    return Targets(**found)


def check_rates(rate: float, ramp_to: float | None, burstiness: float, speed: float, length: float) -> None:
    """Raise PdctlError for rates and factors that are out of range."""
    for option, value in (
        ("--rate", rate), ("--burstiness", burstiness), ("--speed", speed), ("--length", length),
        ("--ramp-to", 1.0 if ramp_to is None else ramp_to),
    ):  # fmt: skip
        if not value > 0:
            raise PdctlError(f"{option} {value:g}: must be greater than 0")
        if math.isinf(value) and option != "--rate":
            raise PdctlError(f"{option} {value:g}: must be finite")
    if burstiness < _LEAST_BURSTINESS:
        raise PdctlError(f"--burstiness {burstiness:g}: must be at least {_LEAST_BURSTINESS:g}")
    if ramp_to is not None and burstiness != 1.0:
        raise PdctlError("--burstiness does nothing with --ramp-to", "leave one of them out")
    if ramp_to is not None and math.isinf(rate):
        raise PdctlError("--ramp-to needs --rate as the first rate", "such as --rate 1 --ramp-to 10")


def vocabulary(endpoint: Endpoint) -> Vocabulary:
    """Token ids of the service's tokenizer, from which prompts are made."""
    from pdctl.bench.client import tokenized
    from pdctl.bench.workload import Vocabulary, sentence

    if endpoint.chat:
        return Vocabulary(())  # messages are text
    ids = asyncio.run(tokenized(endpoint, sentence()))
    if not ids:
        console.note("the service does not tokenize: prompts are made of words, and their lengths are approximate")
    # Skip the first token: it may be a beginning-of-sequence token.
    return Vocabulary(tuple(sorted(set(ids[1:]))))


def _progress(count: int) -> Callable[[Run], None]:
    def show(run: Run) -> None:
        done = sum(record.ended_at > 0 and record.sent_at > 0 for record in run.records)
        failed = sum(bool(record.error) for record in run.records)
        line = f"{done} of {count} done, {len(run.records) - done} running, {failed} failed"
        console.note(f"\r\x1b[K{line}" if is_interactive() else line, end="" if is_interactive() else "\n")

    return show
