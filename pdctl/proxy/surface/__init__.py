"""The proxy's external interface: the application, its OpenAPI description, reloads, the listening socket."""
