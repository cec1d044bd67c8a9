"""The difference between the running plan and the wanted one. Pure, so `apply --dry-run` shows what `apply` does."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from pdctl.plan import Plan, ProcessSpec

# Fields of ProcessSpec that cannot change while the process runs.
_FIXED = ("argv", "role", "env", "cpus", "gpus", "ports", "listen", "api_key_env", "files", "version")
# Settings of the proxy that need a restart.
_PROXY_FIXED = ("tls_cert", "tls_key", "cors_origins", "otlp_endpoint", "accept_nodes", "takeover", "takeover_slots")


@dataclass(frozen=True, slots=True)
class Changes:
    """Process names in the plan's order; `restarted` with the reason, `live` with what changes without a restart."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: dict[str, str] = field(default_factory=dict)
    live: dict[str, str] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.added or self.removed or self.restarted or self.live)

    def to_dict(self) -> dict[str, object]:
        """The changes for `--json`."""
        return asdict(self)


def with_roles(old: Plan, new: Plan) -> Plan:
    """The new plan with the roles that engines got while they ran, where the topology wants the same as before."""
    before = {spec.name: spec for spec in old.processes}
    return replace(new, processes=tuple(_with_role(before.get(spec.name), spec) for spec in new.processes))


def _with_role(old: ProcessSpec | None, new: ProcessSpec) -> ProcessSpec:
    if old is None or not (old.switches and new.switches):
        return new
    if old.planned_role == new.role:
        return replace(new, role=old.role, planned_role=old.planned_role, role_epoch=old.role_epoch)
    # The epoch never goes back: it tells stale requests from new ones.
    return replace(new, role_epoch=old.role_epoch + (old.role != new.role))


def diff(old: Plan, new: Plan) -> Changes:
    """The changes that lead from one plan to the other."""
    before = {spec.name: spec for spec in old.processes}
    after = {spec.name: spec for spec in new.processes}
    restarted = {name: why for name, spec in after.items() if name in before and (why := _why(before[name], spec))}
    for name, spec in after.items():
        fixed = _differing(old.proxy, new.proxy, _PROXY_FIXED) + _service(old, new)
        if spec.is_proxy and name in before and fixed and name not in restarted:
            restarted[name] = f"{', '.join(fixed)} changed"
    live = {name: why for name, why in _live(old, new).items() if name not in restarted}
    touched = {*restarted, *live}
    return Changes(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        restarted=restarted,
        live=live,
        unchanged=tuple(name for name in after if name in before and name not in touched),
    )


def _why(old: ProcessSpec, new: ProcessSpec) -> str:
    """Why a process must be restarted; "" if it need not."""
    fixed = [name for name in _FIXED if not (name == "role" and old.switches and new.switches)]
    words = [_worded(old, new, name) for name in fixed if getattr(old, name) != getattr(new, name)]
    return "; ".join(words)


def _worded(old: ProcessSpec, new: ProcessSpec, name: str) -> str:
    if name == "files":
        changed = {path for path in {**old.files, **new.files} if old.files.get(path) != new.files.get(path)}
        return f"files: {', '.join(sorted(path.rpartition('/')[2] for path in changed))}"
    if name != "argv":
        return f"{name}: {_short(getattr(old, name))} to {_short(getattr(new, name))}"
    gone = [word for word in old.argv if word not in new.argv]
    come = [word for word in new.argv if word not in old.argv]
    return f"command: {_short(' '.join(gone) or 'nothing')} to {_short(' '.join(come) or 'nothing')}"


def _live(old: Plan, new: Plan) -> dict[str, str]:
    """Settings that change without a restart, by process; "pdctl" is the supervisor."""
    found: dict[str, str] = {}
    proxies = [spec.name for spec in new.processes if spec.is_proxy]
    changed = _differing(old.proxy, new.proxy, tuple(f.name for f in fields(old.proxy)))
    settings = [name for name in changed if name not in (*_PROXY_FIXED, "host", "port", "workers", "cpus")]
    settings += [name for name in ("ttft_ms", "tpot_ms", "lease_s") if getattr(old, name) != getattr(new, name)]
    if old.attached != new.attached:
        settings.append("attached engines")
    if settings:
        found |= dict.fromkeys(proxies, f"{', '.join(settings)} changed")
    watching = _differing(old.supervision, new.supervision, tuple(f.name for f in fields(old.supervision)))
    if old.elastic != new.elastic:
        watching.append("elastic")
    if old.dashboard != new.dashboard:
        watching.append("dashboard")
    before = {spec.name: spec for spec in old.processes}
    for spec in new.processes:
        if spec.name in before and _watched(spec) != _watched(before[spec.name]):
            watching.append(f"probes or order of {spec.name}")
        if spec.name in before and spec.role != before[spec.name].role and spec.switches:
            found[spec.name] = f"role: {before[spec.name].role} to {spec.role}"
    if watching:
        found["pdctl"] = f"{', '.join(watching)} changed"
    return found


def _watched(spec: ProcessSpec) -> tuple[object, ...]:
    # A proxy depends on every engine: those that are added are listed anyway.
    return (spec.probe, spec.restart_with, () if spec.is_proxy else spec.depends_on)


def _service(old: Plan, new: Plan) -> list[str]:
    return [name for name in ("served_model_name", "max_model_len") if getattr(old, name) != getattr(new, name)]


def _differing(old: object, new: object, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _short(value: object) -> str:
    shown = str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
