"""State in files: the run directory, the journal, and the records that a later supervisor adopts."""
