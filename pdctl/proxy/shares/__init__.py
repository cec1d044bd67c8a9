"""Fair shares of the engines for API keys, their limits, and what the workers of a proxy share of both."""
