"""The front's handling of leases, offers and the reception of hand-overs."""
