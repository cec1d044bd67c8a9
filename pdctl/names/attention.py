"""The attention backends of the builtin engine, as a topology names them. See pdctl.engine.model.attention."""

ATTENTION_NAMES = ("auto", "flashinfer", "varlen", "triton", "native", "gather")
