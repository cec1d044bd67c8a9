"""`python -m pdctl.engine serve|core|rank|prepare|probe|grammars ...`: the front, its core, a core's other ranks,
model preparation, transfer timing, grammar compilation."""

from __future__ import annotations

import gc
import sys

from pdctl.engine.options import parse
from pdctl.wire import EXIT_CONFIG


def main() -> int:
    """Run one of the parts. Each part imports only what it needs, so that a front has no torch."""
    verb, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if verb == "serve":
        from pdctl.engine.front.main import main as serve

        return serve(parse(argv))
    if verb in ("core", "rank"):
        # Objects created by these imports are long-lived. Without this, the garbage collector scans them repeatedly,
        # which takes a fifth of an engine's start time.
        gc.disable()
        import transformers.modeling_utils  # noqa: F401 - the slowest import; otherwise it would happen during loading

        if verb == "core":
            from pdctl.engine.core.main import main as run
        else:
            from pdctl.engine.executor.rank import main as run

        gc.freeze()
        gc.enable()
        return run(parse(argv))
    if verb == "prepare":
        from pdctl.engine.samples.prepare import main as prepare

        return prepare(argv)
    if verb == "probe":
        from pdctl.engine.probe import main as probe

        return probe(argv)
    if verb == "grammars":
        from pdctl.engine.model.grammar import main as grammars

        return grammars(argv)
    sys.stderr.write("usage: python -m pdctl.engine serve|core|rank|prepare|probe|grammars ...\n")
    return 2


try:
    sys.exit(main())
except ModuleNotFoundError as failure:
    if (failure.name or "").startswith("pdctl"):
        raise
    sys.stderr.write(f"error: the package {failure.name} is not installed\nhint: pip install 'pdctl[engine]'\n")
    sys.exit(EXIT_CONFIG)
