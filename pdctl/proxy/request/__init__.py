"""One client request's life: admission, legs, failover."""
