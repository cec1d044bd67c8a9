"""One file for each area: facts in, findings out."""
