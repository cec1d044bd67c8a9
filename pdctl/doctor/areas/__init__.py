"""One file per area: facts in, findings out."""
