"""The full product: many random loads and all ways of running, for every family. About 25 minutes.

    python -m tests.engine.parity [--rounds 10] [--family llama ...]
"""

from __future__ import annotations

import argparse
import time

import torch

from tests.engine.parity import metamorphic, mixes
from tests.engine.parity.families import FAMILIES, build


def main() -> int:
    """One line a family; an AssertionError at the first difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.parity")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--family", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.family:
        began, family = time.monotonic(), build(kind)
        engines = [mixes.check(family, seed) for seed in range(options.rounds)]
        answers = metamorphic.reference(family)
        assert metamorphic.alone(family, metamorphic.PLAIN) == answers, f"{kind}: one at a time"
        ways = list(metamorphic.variants())
        with metamorphic.told_answers(answers):
            for name, run in ways:
                assert run(family) == answers, f"{kind}: {name}"
        metamorphic.check_migrations(family, answers)
        preempted, cached, accepted = (
            sum(getattr(engine, what) for engine in engines) for what in ("preempted", "cached", "accepted")
        )
        print(
            f"{kind}: {options.rounds} random loads ({preempted} preemptions, {cached} tokens cached, "
            f"{accepted} guessed), {len(ways)} ways to run and all migrations: identical "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
