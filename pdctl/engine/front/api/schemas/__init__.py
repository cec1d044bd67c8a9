"""JSON Schemas of guided output."""

from pdctl.engine.front.api.schemas.check import check_schema, narrowed, unsupported_pattern

__all__ = ["check_schema", "narrowed", "unsupported_pattern"]
