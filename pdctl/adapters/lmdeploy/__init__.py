"""LMDeploy's api_server with DistServe (`--role Prefill` and `--role Decode`), or alone (`--role Hybrid`)."""
