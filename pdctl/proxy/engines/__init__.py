"""The proxy's view of the engines, and the choice of engines for a request."""
