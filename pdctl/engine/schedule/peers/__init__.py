"""What other engines get of this one: which blocks can be found, blocks that are lent, and sequences that move."""
