"""Processes of this machine: who listens on a port, which supervisors live, who carries a stamp."""
