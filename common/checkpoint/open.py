"""The one way from a model folder and `--load-format` to a source of weights."""

from pathlib import Path
from typing import Literal, get_args

from scission.common.checkpoint.dummy import DummySource
from scission.common.checkpoint.headers import read_json
from scission.common.checkpoint.source import FileSource, Source
from scission.common.errors import ConfigError

LoadFormat = Literal["auto", "dummy"]


def open_source(directory: Path, load_format: LoadFormat = "auto", seed: int = 0) -> Source:
    """The weights of a model folder: its shards, or (dummy) random ones by its config.json.

    Raises:
        ConfigError: an unknown load format.
        CheckpointError: shards or config that cannot be read, or no model of ours.
    """
    if load_format not in get_args(LoadFormat):
        accepted = ", ".join(get_args(LoadFormat))
        raise ConfigError(f"load format is {load_format!r}; accepted are {accepted}")
    if load_format == "auto":
        return FileSource(directory)
    return DummySource(read_json(directory / "config.json"), seed)
