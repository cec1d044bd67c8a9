"""SGLang's OpenAI server, alone or disaggregated: a concurrent hand-shake with bootstrap host, port and room."""
