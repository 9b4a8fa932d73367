"""Fixed texts of the bundled model's chats; copied beside its weights as encoding/encoding_dsv4.py.

Only the constants are read, by name; the file is never run. Placeholders in braces are filled by
plain replacement: {dsml_token}, {thinking_start_token}, {thinking_end_token}, {tool_schemas},
{schema}.
"""

TOOLS_TEMPLATE = """## Functions you can call

Some questions are better answered with the help of a function. The functions of this conversation
are listed at the end of this section, one JSON description per line.

To call functions, end your turn with one block of exactly this form:

<{dsml_token}tool_calls>
<{dsml_token}invoke name="FUNCTION">
<{dsml_token}parameter name="ARGUMENT" string="true">plain text</{dsml_token}parameter>
<{dsml_token}parameter name="OTHER" string="false">[1, 2.5, true]</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}tool_calls>

How to fill it in:
- One invoke element per call; several calls go into the same block, one after another.
- One parameter element per argument, named as in the function's description.
- string="true" means that the value is text and stands as it is, without quotes and escapes.
- string="false" means that the value is JSON: a number, true, false, null, a list or an object.
- Leave out optional arguments that you do not need. Never invent functions or arguments.
- Nothing follows the block. The results come back in <tool_result> elements, in the calls' order.

If you reason first, keep all of it between {thinking_start_token} and {thinking_end_token}; the
answer or the block of calls comes after {thinking_end_token}.

The functions:
{tool_schemas}"""

response_format_template = """## Form of the answer

Answer with one JSON value and nothing else: no introduction, no code fence, no remark after it.
It must be valid under this JSON Schema:
{schema}"""

REASONING_EFFORT_MAX = """Depth of reasoning: the greatest.
Take all the room you need before you answer. Split the question into its parts, follow more than
one way to solve each of them, look for the case that breaks your reasoning, and check the final
result against what was asked.

"""
