"""Which engine has KV of which beginning of a prompt: what engines tell, for `routing = "prefix_aware"`.

It is advice. A wrong guess costs the time to compute a prompt, never a token: the engine finds KV by the names of its
blocks.
"""
