"""pdctl: one command that runs prefill/decode-disaggregated LLM serving."""

__version__ = "0.1.0"
