"""Nearly valid topologies: each gives a plan, or a list of problems with file and line, and nothing else."""

from __future__ import annotations

import random
import time
from pathlib import Path

from pdctl.commands.setup.default import default_text
from pdctl.errors import ConfigError, PdctlError
from pdctl.host import Gpu, Host
from pdctl.plan import make_plan
from pdctl.topology.loader import load_text
from tests.service import REPOSITORY

_VALUES = [
    "0", "-1", "1", "5.0", "1e308", "-0.0", "inf", "nan", "9" * 19, "9" * 40, "true", '""', '"x"', "'x'", "[]", "[0]",
    '["a"]', "[[1]]", "{}", "{ a = 1 }", '"\\u0000"', '"é"', '"/"', '"../.."', '"~"', '"http://x"', '"GPU-0"',
    "1979-05-27", "07:32:00", '"prefill"', '"vllm"', '"builtin"', '"' + "y" * 5000 + '"', "'''\nlong\n'''", '"a\\nb"',
    '"127.0.0.1"', '"::1"', "[1, 2, 3]", '["SIGTERM"]', '[40000, 40001]', '{ "" = "x" }', '{ "A=B" = "x" }', "-5.5",
]  # fmt: skip
_LINES = [
    "[[engines]]", "[engines]", "[service]", "[proxy]", "[unheard_of]", "a.b.c = 1", "=", "[", "]]", '"""', "'''", "\t",
    "\\", "# only words", "x = ", "[[engines.env]]", "[engines.env]", "\x7f", "\ufeff", "name = name", "gpus = 3",
]  # fmt: skip


def walk(seed: int, seconds: float) -> list[str]:
    """Returns findings: a topology and its outcome."""
    chance = random.Random(seed)
    hosts = [_host(gpus) for gpus in (0, 2)]
    texts = [(REPOSITORY / "pdctl.toml.example").read_text(), *(default_text(host) for host in hosts)]
    found: list[str] = []
    kinds: set[str] = set()
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        count += 1
        text = _changed(chance, chance.choice(texts))
        reason = _outcome(text, chance.choice(hosts))
        if reason and reason not in kinds:
            kinds.add(reason)
            found.append(f"{reason}\n  from topology number {count} of seed {seed}:\n{text[:3000]}")
    print(f"{count} topologies")
    return found


def _host(gpus: int) -> Host:
    root = Path("/nowhere")
    cards = tuple(Gpu(n, f"GPU-{n}", "H200", 141 << 30) for n in range(gpus))
    return Host((0, 1), cards, 24 << 30, {}, "/usr/bin/python3", root / "c", root / "r", root / "s")


def _changed(chance: random.Random, text: str) -> str:
    lines = text.splitlines()
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(lines) + 1)
        match chance.randrange(7):
            case 0 | 1 | 2:
                _other_value(chance, lines)
            case 3:
                lines[at : at + chance.randrange(4)] = []
            case 4:
                lines.insert(at, chance.choice(_LINES))
            case 5 if lines:
                lines.insert(at, chance.choice(lines).removeprefix("# "))
            case _ if lines:
                at = chance.randrange(len(lines))
                place = chance.randrange(len(lines[at]) + 1)
                letter = chance.choice("\0\t\"'=[\\\u00e9\U0001f600")
                lines[at] = lines[at][:place] + letter + lines[at][place:]
    return "\n".join(lines) + "\n"


def _other_value(chance: random.Random, lines: list[str]) -> None:
    keys = [number for number, line in enumerate(lines) if "=" in line]
    if keys:
        at = chance.choice(keys)
        key = lines[at].removeprefix("# ").partition("=")[0]
        lines[at] = f"{key}= {chance.choice(_VALUES)}"


def _outcome(text: str, host: Host) -> str:
    """What is wrong with an outcome; "" if nothing."""
    try:
        make_plan(load_text(text, "x.toml", host), host)
    except ConfigError as failure:
        last = text.count("\n") + 1
        if not failure.problems:
            return "a refusal without a problem"
        for problem in failure.problems:
            if not problem.message or not 0 <= problem.line <= last or problem.message.startswith("Value error"):
                return f"a problem at line {problem.line} of {last}: {problem.message!r}"
    except PdctlError as failure:
        return "" if str(failure) else "an error without a message"
    except Exception as failure:  # noqa: BLE001 - that is what is looked for
        return f"{type(failure).__name__}: {failure}"[:300]
    return ""
