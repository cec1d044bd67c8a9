"""A mock of SGLang's server in PD mode, by what sglang 0.5.23 does: `python -m tests.fakes.sglang.server ARGS`.

It takes SGLang's own arguments and environment. Tokens are letters, a function of all tokens before them, so a
continuation at the right token is the same text. No KV moves: decode gets the prompt's ids at prefill's bootstrap port.
`POST /mock` sets the faults, `GET /mock` tells what happened (see `state.Faults` and `state.Engine.told`).
"""
