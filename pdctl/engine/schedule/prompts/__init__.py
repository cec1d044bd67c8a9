"""Which prompt is computed next."""
