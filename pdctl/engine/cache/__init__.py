"""The KV cache: blocks, the memory they live in, where each lies."""
