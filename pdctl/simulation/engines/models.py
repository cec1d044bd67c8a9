"""The latency models with which imagined engines begin: as after the steps that a real one measures at its start."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

from pdctl.engine.schedule.latency import LatencyModel
from pdctl.latency import Step, StepTimes, step_of

_PROMPTS, _BEFORE = (16, 64, 256, 512, 2048), (0, 1024, 8192)
_BATCHES, _CONTEXTS = (1, 2, 4, 8, 16, 32), (64, 512, 4096)


class Models:
    """Makes a model for each start of an engine. Each learns on its own."""

    def __init__(self) -> None:
        self._known: dict[StepTimes, LatencyModel] = {}

    def of(self, times: StepTimes) -> LatencyModel:
        """A model that predicts these times."""
        if times not in self._known:
            model = LatencyModel()
            for step in _steps():
                model.took(step, times.seconds(step))
            self._known[times] = LatencyModel(model.measured)
        return LatencyModel(deepcopy(self._known[times].measured))


def _steps() -> list[Step]:
    prompts = [step_of([(count, before)]) for count, before in product(_PROMPTS, _BEFORE)]
    decodes = [step_of([(1, context)] * batch) for batch, context in product(_BATCHES, _CONTEXTS)]
    mixed = [decode.with_prompt(count, 0) for decode, count in product(decodes[::3], _PROMPTS)]
    # In turn, as a fit follows every few steps.
    return [step for group in (prompts, decodes, mixed) for step in group]
