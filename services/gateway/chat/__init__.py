"""Chat formats: messages to prompt text, and a completion's text back to reasoning, content and
tool calls.
"""
