"""Other projects' routers, as real processes, in front of this project's engines. Installed by scripts/routers."""
