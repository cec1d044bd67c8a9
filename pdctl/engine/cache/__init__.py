"""The KV cache: blocks, their memory and its layout."""
