"""From what a user calls a model to a folder that holds it: a folder, a hub id, or nothing."""

from pathlib import Path

from scission.common.errors import ConfigError

BUNDLED_NAME = "scission-nano"
BUNDLED = Path(__file__).parent / "nano"
# weights, configs, tokenizers and chat encodings (read, never run); no pickles
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "encoding/*"]


def resolve_model(model: str | None) -> tuple[Path, str]:
    """The model's folder, and the name it is served under unless another is wished.

    A folder never touches the network. A hub id is downloaded into the hub's cache when it is not
    there yet; None is the bundled model, which comes with the package.

    Raises:
        ConfigError: there is no such folder, or the hub does not give the model.
    """
    if model is None:
        return BUNDLED, BUNDLED_NAME
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is no model folder: it has no config.json")
        return folder, folder.resolve().name
    if not is_hub_id(model):
        raise ConfigError(f"there is no model folder {model}")
    return _download(model), model


def is_hub_id(model: str) -> bool:
    """`owner/name`; anything else that is no folder is a folder's name gone wrong."""
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def _download(model: str) -> Path:
    # slow to import, and only wanted here
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except Exception as error:
        # the hub's client raises errors of several libraries
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{model} is no folder, and the hub does not give it: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
