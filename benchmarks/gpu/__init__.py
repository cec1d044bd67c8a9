"""The engine on a GPU: `python -m benchmarks.gpu`, or `scripts/gpu` on a machine without a network."""
