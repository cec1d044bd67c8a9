"""One file per verb: resolve options, call one function, print."""
