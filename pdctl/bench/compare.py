"""Two results side by side: ratios with bootstrap intervals, from the samples that each file keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdctl.bench.metrics import Figures, percentile, ratio_interval
from pdctl.errors import PdctlError

# Of samples: (title, metric, percentile).
_FIGURES = (
    ("TTFT p50", "ttft", 50), ("TTFT p99", "ttft", 99), ("TPOT p50", "tpot", 50), ("TPOT p99", "tpot", 99),
    ("ITL p50", "itl", 50), ("ITL p99", "itl", 99), ("E2E p50", "e2el", 50), ("E2E p99", "e2el", 99),
)  # fmt: skip
_RATES = ("request_throughput", "request_goodput", "output_throughput")


@dataclass(frozen=True, slots=True)
class Ratio:
    """`first` over `second`; low and high are the 95% interval, equal to the ratio where there is none."""

    name: str
    first: float
    second: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether the interval leaves 1 out, and on which side."""
        if self.low <= 1.0 <= self.high:
            return "no difference shown"
        return "first is lower" if self.ratio < 1 else "first is higher"


def read(path: Path) -> Figures:
    """A result file, ours or one of vLLM's `bench serve --save-detailed`. Raises PdctlError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise PdctlError(f"{path} cannot be read: {failure.strerror}") from None
    except ValueError as failure:
        raise PdctlError(f"{path} is no JSON: {failure}", "a result of: pdctl bench serve --out FILE") from None
    if not isinstance(found, dict) or not {"ttfts", "itls", "output_lens"} <= set(found):
        hint = "a result of: pdctl bench serve --out FILE, or vllm bench serve --save-result --save-detailed"
        raise PdctlError(f"{path} holds no samples (ttfts, itls, output_lens)", hint)
    return found


def samples(figures: Figures) -> dict[str, list[float]]:
    """Milliseconds of each metric, of answers without an error."""
    ttfts, itls, outputs = (_rows(figures, name) for name in ("ttfts", "itls", "output_lens"))
    errors = _rows(figures, "errors") or [""] * len(ttfts)
    good = [n for n in range(len(ttfts)) if not errors[n] and outputs[n]]
    whole = {n: float(ttfts[n]) + sum(itls[n]) for n in good}
    return {
        "ttft": [ttfts[n] * 1000 for n in good],
        "tpot": [sum(itls[n]) / (outputs[n] - 1) * 1000 for n in good if outputs[n] > 1],
        "itl": [gap * 1000 for n in good for gap in itls[n]],
        "e2el": [whole[n] * 1000 for n in good],
    }


def _rows(figures: Figures, name: str) -> list:  # type: ignore[type-arg]  # of what the file holds
    value = figures.get(name)
    return value if isinstance(value, list) else []


def compare(first: Figures, second: Figures) -> list[Ratio]:
    """Every figure that both have."""
    ours, theirs = samples(first), samples(second)
    found = []
    for title, metric, part in _FIGURES:
        if not ours[metric] or not theirs[metric]:
            continue

        def of(values: Sequence[float], part: int = part) -> float:
            return percentile(values, part)

        ratio, low, high = ratio_interval(ours[metric], theirs[metric], of)
        found.append(Ratio(title, of(ours[metric]), of(theirs[metric]), ratio, low, high))
    for name in _RATES:
        one, other = first.get(name), second.get(name)
        if isinstance(one, int | float) and isinstance(other, int | float) and other:
            found.append(Ratio(name.replace("_", " "), one, other, one / other, one / other, one / other))
    return found
