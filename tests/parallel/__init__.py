"""Services whose engines run over several processes: the same answers as one process gives, also when ranks die."""
