"""The arithmetic of a step: models, attention, sampling, grammars."""
