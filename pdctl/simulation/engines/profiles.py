"""How long the steps of an imagined engine take: from what an engine has measured of itself, or from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from pdctl.bench.profile import Profile, load
from pdctl.engine.core.latency_file import read_kept
from pdctl.engine.schedule.latency import LatencyModel
from pdctl.errors import PdctlError
from pdctl.host.models import fingerprint
from pdctl.latency import StepTimes


@dataclass(frozen=True, slots=True)
class Speed:
    """`times`: of an engine's steps; `source`: where they are from, for people; `dtype`: of the engine that measured
    them, "" if unknown."""

    times: StepTimes
    source: str
    dtype: str = ""

    def scaled(self, factor: float) -> Speed:
        """An engine that is `factor` times as fast."""
        a, b, c, d, e = (value / factor for value in self.times.coefficients)
        times = msgspec.structs.replace(self.times, coefficients=(a, b, c, d, e))
        return replace(
            self, times=times, source=f"{self.source}, {factor:g} times as fast" if factor != 1 else self.source
        )


def read_speed(path: Path) -> Speed:
    """A file of the engines' own cache, of `bench profile --out`, or with the five coefficients of `pdctl.latency` in
    seconds: {"coefficients": [...]}. Raises PdctlError."""
    if (kept := read_kept(path)) is not None:
        return _kept_speed(path, *kept)
    if (profile := load(path)) is not None:
        return Speed(_of_profile(profile), f"{path} ({profile.model}, {profile.date})")
    try:
        found = json.loads(path.read_text())["coefficients"]
        a, b, c, d, e = (float(value) for value in found)
    except (OSError, ValueError, KeyError, TypeError) as failure:
        hint = 'use a file of: pdctl bench profile --out FILE, or {"coefficients": [a, b, c, d, e]}'
        raise PdctlError(f"{path} is not a profile: {failure}", hint) from None
    if min(a, b, c, d, e) < 0 or a + b <= 0:
        raise PdctlError(f"{path}: coefficients must not be negative, and a step must take time")
    return Speed(StepTimes((a, b, c, d, e)), str(path))


def own_speed(cache_root: Path, model: Path) -> Speed:
    """What an engine of this machine has measured with this model, the newest if there are several. Raises
    PdctlError."""
    try:
        name = fingerprint(model)
    except OSError:
        name = ""
    found = []
    for path in (cache_root / "latency").glob("*.json"):
        kept = read_kept(path)
        if kept is not None and kept[0][:1] == (name,):
            found.append((path.stat().st_mtime, path, kept))
    if not found:
        hint = "start it once here (pdctl up), or give --profile FILE"
        raise PdctlError(f"no engine has measured the model {model} on this machine", hint)
    _, path, kept = max(found, key=lambda one: one[0])
    return _kept_speed(path, *kept)


def _kept_speed(path: Path, key: tuple[str, ...], model: LatencyModel) -> Speed:
    # Without the corrections of a moment: the fit to all measured steps.
    times = StepTimes(model.times.coefficients)
    return Speed(times, f"{path} ({', '.join(key[1:])})", key[1] if len(key) > 1 else "")


def _of_profile(profile: Profile) -> StepTimes:
    """From the lines of prefills and of decodes: a prompt is one sequence, and a decode's token is one of its own."""
    (prefill, per_token, squared), (decode, context, per_stream) = (
        profile.prefill.coefficients,
        profile.decode.coefficients,
    )
    per_sequence = max(0.0, per_stream - per_token)
    # The constants differ; what a sequence adds is in the prefill's.
    per_step = decode if decode > 0 else max(0.0, prefill - per_sequence)
    return StepTimes((per_step, per_token, 2 * squared, per_sequence, context))
