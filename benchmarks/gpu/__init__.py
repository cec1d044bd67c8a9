"""What a GPU does with the engine: `python -m benchmarks.gpu`, or `scripts/gpu` on a machine without a network."""
