"""What the user asked for: dataclasses (spec), keys and defaults (schema), TOML to Topology (loader)."""
