"""The engine's front: OpenAI API, leases and hand-overs. No torch; a long step cannot starve it."""
