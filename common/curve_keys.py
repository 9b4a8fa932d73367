"""CURVE keys on disk: one folder that prefills, decodes and nobody else can read.

`prefill.public`, `prefill.secret`, `decode.public` and `decode.secret` each hold one Z85 key. A
role reads its own pair and the others' public keys; a decode lets in who has the prefill's.
"""

import os
from pathlib import Path

from scission.common.errors import ConfigError
from scission.common.transfer.options import CurveKeys
from scission.common.types import Role

_ROLES = (Role.PREFILL, Role.DECODE)


def load_curve_keys(directory: Path, role: Role) -> CurveKeys:
    """The keys of one role.

    Raises:
        ConfigError: a key is missing, cannot be read or is no key.
    """
    return CurveKeys(
        public=_read(directory / f"{role}.public"),
        secret=_read(directory / f"{role}.secret"),
        server=_read(directory / f"{Role.DECODE}.public"),
        allowed=frozenset({_read(directory / f"{Role.PREFILL}.public")}),
    )


def write_curve_keys(directory: Path) -> None:
    """Make the key pairs of both roles, unless the folder has them.

    Raises:
        ConfigError: the folder cannot be written, or holds some of the keys but not all.
    """
    # the gateway, which has no ZeroMQ, reads no keys
    import zmq

    paths = [directory / f"{role}.{part}" for role in _ROLES for part in ("public", "secret")]
    present = [path for path in paths if path.exists()]
    if len(present) == len(paths):
        return
    if present:
        raise ConfigError(f"{directory} holds {present[0].name} but not all keys: remove them all")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for role in _ROLES:
            public, secret = zmq.curve_keypair()
            _write(directory / f"{role}.public", public)
            _write(directory / f"{role}.secret", secret)
    except OSError as error:
        raise ConfigError(f"keys cannot be written to {directory}: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"CURVE key {path} cannot be read: {error}") from error


def _write(path: Path, key: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key + b"\n")
