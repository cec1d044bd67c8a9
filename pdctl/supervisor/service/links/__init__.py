"""Links and sweeps for kinds whose engines neither keep their links nor free KV by themselves."""
