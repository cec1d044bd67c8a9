"""The user's topology: dataclasses (spec), keys and defaults (schema), TOML to Topology (loader)."""
