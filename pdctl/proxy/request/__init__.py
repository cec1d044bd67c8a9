"""The path of one client request: admission, legs, failover."""
