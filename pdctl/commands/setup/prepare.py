"""Prepare the model before anything starts, in a separate process, so that the command line never imports torch."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.errors import PdctlError
from pdctl.host import program

if TYPE_CHECKING:
    from pdctl.plan import Plan


def _engines_download(planned: Plan) -> bool:
    """Whether the model is on the Hub, and every engine is of a kind that downloads it into its own environment."""
    from pdctl.adapters import can_launch, kinds, launcher

    engines = {spec.kind for spec in planned.processes if spec.is_engine} & set(kinds())
    on_hub = not planned.model_path.startswith("/")
    return on_hub and not any(launcher(kind).packages for kind in engines if can_launch(kind))


def with_model(planned: Plan) -> Plan:
    """Convert or download the model unless that was done before. Raises PdctlError."""
    if planned.model_ready or _engines_download(planned):
        return planned
    from pdctl.plan.interpreter import interpreter_of

    kept = (
        f"(once; it is kept in {Path(planned.model_path).parent})"
        if planned.model_path.startswith("/")
        else "from the Hub"
    )
    console.note(f"preparing {planned.model} {kept}")
    python = interpreter_of(planned, f"preparing {planned.model}")
    argv = program.engine(python, "prepare", planned.model, planned.model_path)
    done = subprocess.run(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False)
    if done.returncode == 1:
        raise PdctlError(f"model {planned.model} cannot be used (see above)")
    if done.returncode != 0:
        raise PdctlError(
            f"preparing the model failed with exit code {done.returncode}",
            "is the engine installed? pip install 'pdctl[engine]'",
        )
    path = done.stdout.strip().splitlines()[-1]
    argvs = {
        spec.name: tuple(path if word == planned.model_path else word for word in spec.argv)
        for spec in planned.processes
    }
    processes = tuple(replace(spec, argv=argvs[spec.name]) for spec in planned.processes)
    return replace(planned, model_path=path, model_ready=True, processes=processes)
