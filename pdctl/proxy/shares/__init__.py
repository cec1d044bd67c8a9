"""Fair shares of the engines for API keys, and their limits."""
