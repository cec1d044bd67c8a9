"""Words of a topology for the builtin engine: the policies of its scheduler, what it publishes. What they do:
pdctl.engine.schedule, pdctl.engine.front.kv_events."""

POLICY_NAMES = ("fcfs", "ljf", "sjf", "edf")
# Of which blocks can be found: nothing, their hashes, or these and the tokens in them.
KV_EVENTS = ("off", "hashes", "tokens")
# Whether the next step is scheduled while one computes; auto: on a GPU.
SCHEDULE_AHEAD = ("auto", "true", "false")
# Whether KV of a prompt's beginning is fetched from another engine; auto: where that is predicted to be faster.
FETCH_PREFIXES = ("auto", "true", "false")
# With `deterministic`, prompts are computed in segments of so many tokens, rounded up to whole blocks.
SEGMENT_TOKENS = 128
