"""Other APIs, served by translation to chat completions: OpenAI's Responses and Anthropic's Messages.

Every engine kind serves chat completions, and the hand-over from prefill to decode and failover work on them. So these
APIs have both with every kind; see docs/decisions/006-other-apis-are-translated.md.
"""

from pdctl.proxy.translation.api import CHAT_PATH, Api, Rendering, Translated
from pdctl.proxy.translation.messages import MESSAGES
from pdctl.proxy.translation.responses import RESPONSES

APIS: dict[str, Api] = {api.path: api for api in (RESPONSES, MESSAGES)}

__all__ = ["APIS", "CHAT_PATH", "Api", "Rendering", "Translated"]
