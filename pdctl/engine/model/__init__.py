"""The computation of a step: models, attention, sampling, grammars."""
