"""What must happen to a plan's model before its engines start. Pure."""

from __future__ import annotations

from dataclasses import replace

from pdctl.adapters import can_launch, kinds, launcher
from pdctl.host import program
from pdctl.plan.interpreter import interpreter_of
from pdctl.plan.spec import Plan


def preparation(planned: Plan) -> list[str] | None:
    """The command that converts or downloads the model and prints its path; None if there is nothing to do. Raises
    PdctlError if no interpreter can do it."""
    if planned.model_ready or _engines_download(planned):
        return None
    python = interpreter_of(planned, f"preparing {planned.model}")
    return program.engine(python, "prepare", planned.model, planned.model_path)


def with_model_at(planned: Plan, path: str) -> Plan:
    """The plan with the model where it was put."""
    argvs = {
        spec.name: tuple(path if word == planned.model_path else word for word in spec.argv)
        for spec in planned.processes
    }
    processes = tuple(replace(spec, argv=argvs[spec.name]) for spec in planned.processes)
    return replace(planned, model_path=path, model_ready=True, processes=processes)


def _engines_download(planned: Plan) -> bool:
    """Whether the model is on the Hub, and every engine is of a kind that downloads it into its own environment."""
    engines = {spec.kind for spec in planned.processes if spec.is_engine} & set(kinds())
    on_hub = not planned.model_path.startswith("/")
    return on_hub and not any(launcher(kind).packages for kind in engines if can_launch(kind))
