"""Names that a topology uses, one module for each kind of thing. Several parts of pdctl check or offer them without
needing the part that gives them a meaning."""
