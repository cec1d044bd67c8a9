"""What is kept in files: the run directory, the journal, what a later supervisor adopts."""
