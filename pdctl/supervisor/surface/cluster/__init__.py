"""The control API of a service that runs on several machines."""
