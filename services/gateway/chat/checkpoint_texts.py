"""The fixed texts of a checkpoint's `encoding/encoding_dsv4.py`, read as data.

The file is parsed with `ast` and only its module-level constants are taken; it is never imported or
executed.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

from scission.common.errors import CheckpointError

FILE = Path("encoding") / "encoding_dsv4.py"
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CheckpointTexts:
    """None or empty: the file, or the name in it, is missing."""

    tools_template: str | None = (
        None  # {dsml_token} {thinking_start_token} {thinking_end_token} {tool_schemas}
    )
    response_format_template: str | None = None  # {schema}
    effort_prefixes: dict[str, str] = field(default_factory=dict)  # effort -> text right after BOS
    is_file_present: bool = False


def read_checkpoint_texts(folder: Path) -> CheckpointTexts:
    """Read DIR/encoding/encoding_dsv4.py; a missing file gives empty texts.

    Raises:
        CheckpointError: the file is there but is no Python source of reasonable size.
    """
    path = folder / FILE
    if not path.is_file():
        return CheckpointTexts()
    if path.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{FILE} is larger than {MAX_FILE_BYTES} bytes")
    try:
        constants = module_constants(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{FILE} cannot be parsed: {error}") from error
    # the April releases have one prefix, for max; the July ones a dict of them
    prefixes = constants.get("REASONING_EFFORT_PROMPTS")
    if not isinstance(prefixes, dict):
        april = constants.get("REASONING_EFFORT_MAX")
        prefixes = {"max": april} if isinstance(april, str) else {}
    return CheckpointTexts(
        tools_template=_text(constants.get("TOOLS_TEMPLATE")),
        response_format_template=_text(constants.get("response_format_template")),
        effort_prefixes={
            key: text
            for key, text in prefixes.items()
            if isinstance(key, str) and isinstance(text, str) and text
        },
        is_file_present=True,
    )


def module_constants(source: str) -> dict[str, object]:
    """Names assigned at module level to strings, concatenations of them, or dicts of them."""
    constants: dict[str, object] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        try:
            found = _constant(value, constants)
        except ValueError:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                constants[target.id] = found
    return constants


def _constant(node: ast.expr, known: dict[str, object]) -> object:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            parts = _constant(left, known), _constant(right, known)
            if isinstance(parts[0], str) and isinstance(parts[1], str):
                return parts[0] + parts[1]
        case ast.Dict(keys=keys, values=values):
            entries: dict[object, object] = {}
            for key, entry in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant):
                    try:
                        entries[key.value] = _constant(entry, known)
                    except ValueError:
                        continue
            return entries
    raise ValueError("not a constant")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
