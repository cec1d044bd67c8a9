"""The engine's front: OpenAI API, leases and hand-overs. It has no torch, and a long step cannot starve it."""
