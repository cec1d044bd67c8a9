"""A complete engine kind for tests, added with PDCTL_ENGINE_KINDS=echo=tests.adapters.echo.

Its engines answer with the prompt, repeated, one byte per token. The proxy calls prefill and decode at once, and decode
connects to prefill's bootstrap port, as in SGLang. The kind supports no supervisor call except reporting its progress.
"""
