"""OpenAI's API as pdctl's proxies and engines share it: requests, fields, answers, errors."""
