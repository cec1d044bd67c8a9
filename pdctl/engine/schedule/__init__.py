"""Which tokens are computed next. Ids only."""
