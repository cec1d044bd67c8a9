"""The interpreter with pdctl's own engine, for its parts that run outside an engine."""

from __future__ import annotations

from pdctl.adapters import can_launch, kinds, launcher
from pdctl.errors import PdctlError
from pdctl.host.program import ENGINE_HINT, engine_python
from pdctl.plan.spec import Plan


def interpreter_of(plan: Plan | None, purpose: str) -> str:
    """That of the plan's first engine that runs pdctl's own code, else the default. Raises PdctlError if there is none.
    `purpose`: what needs it, as the start of a sentence."""
    ours = {kind for kind in kinds() if can_launch(kind) and launcher(kind).packages}
    found = next((spec.argv[0] for spec in (plan.processes if plan else ()) if spec.kind in ours), engine_python())
    if not found:
        raise PdctlError(f"{purpose} needs pdctl's engine, and this binary has no Python for it", ENGINE_HINT)
    return found
