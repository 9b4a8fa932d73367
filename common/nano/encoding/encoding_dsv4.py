"""Fixed texts of scission-nano's chats; copied beside its weights as encoding/encoding_dsv4.py.

Short ones: a model of a few million parameters reads every token of them at each tool call.
"""

TOOLS_TEMPLATE = """Tools, called in a <{dsml_token}tool_calls> block:
{tool_schemas}"""

response_format_template = """Answer with one JSON value of this schema:
{schema}"""

REASONING_EFFORT_MAX = """Think step by step.

"""
