"""Prepare the model before anything starts, in a separate process, so that the command line never imports torch."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl import console
from pdctl.errors import PdctlError

if TYPE_CHECKING:
    from pdctl.plan import Plan


def with_model(planned: Plan) -> Plan:
    """Convert or download the model unless that was done before. Raises PdctlError."""
    if planned.model_ready:
        return planned
    from pdctl.plan.models import preparation, with_model_at

    argv = preparation(planned)
    if argv is None:
        return planned
    kept = (
        f"(once; it is kept in {Path(planned.model_path).parent})"
        if planned.model_path.startswith("/")
        else "from the Hub"
    )
    console.note(f"preparing {planned.model} {kept}")
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, errors="replace", check=False
    )
    if done.returncode == 1:
        raise PdctlError(f"model {planned.model} cannot be used (see above)")
    if done.returncode != 0:
        raise PdctlError(
            f"preparing the model failed with exit code {done.returncode}",
            "is the engine installed? pip install 'pdctl[engine]'",
        )
    return with_model_at(planned, done.stdout.strip().splitlines()[-1])
