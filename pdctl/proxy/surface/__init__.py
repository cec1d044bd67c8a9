"""What clients and the supervisor reach: the application, its description, settings read anew, the listening socket."""
