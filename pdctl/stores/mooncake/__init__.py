"""Mooncake Store: a master that knows where blocks are; the blocks are in memory that engines add."""
