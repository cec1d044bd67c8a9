"""The policies of the builtin engine's scheduler, as a topology names them. What they do: pdctl.engine.schedule."""

POLICY_NAMES = ("fcfs", "ljf", "sjf", "edf")
