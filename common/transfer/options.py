"""What a transfer endpoint is configured with; checked whole when it is made."""

from dataclasses import dataclass, field
from pathlib import Path

from scission.common.errors import ConfigError

KEY_CHARACTERS = 40  # a CURVE key in Z85


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """CURVE keys in Z85: our own pair, the decodes' public key, and the public keys a decode lets
    in.
    """

    public: str
    secret: str = field(repr=False)
    server: str
    allowed: frozenset[str]

    def __post_init__(self) -> None:
        for name, key in (
            ("public", self.public),
            ("secret", self.secret),
            ("server", self.server),
        ):
            if len(key) != KEY_CHARACTERS:
                raise ConfigError(
                    f"transfer.curve.{name} must be a Z85 key of {KEY_CHARACTERS} characters, "
                    f"got {len(key)}"
                )
        for key in self.allowed:
            if len(key) != KEY_CHARACTERS:
                raise ConfigError(f"transfer.curve.allowed holds a key of {len(key)} characters")


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Sizes in bytes, times in seconds.

    `bind` is where a receiver listens: `tcp://HOST:PORT` (`*` is a free port) or, within one
    process, `inproc://NAME`. `advertise_host` replaces HOST in the address given to peers (needed
    for 0.0.0.0). `arena_dir` is a directory of shared memory that prefill and decode both see; None
    leaves the shared tier out.
    """

    bind: str = "tcp://127.0.0.1:*"
    advertise_host: str | None = None
    arena_dir: Path | None = Path("/dev/shm")
    slot_bytes: int = 4 << 20  # the largest chunk
    arena_bytes: int = 64 << 20  # all that a receiver lets senders have in flight
    window_slots: int = 8  # the most that one transfer may have in flight
    bulk_sockets: int = 2  # connections a pair ships rows over
    copy_threads: int = 2  # that copy and hash at each end
    connect_timeout_s: float = 2.0  # until HELLO is answered
    stall_s: float = 1.0  # without a byte of progress: ask again
    decide_s: float = 2.0  # without a byte of progress: the transfer has failed
    max_transfers: int = 1024  # open at one receiver; more are refused
    max_reships: int = 3  # of one chunk
    curve: CurveKeys | None = None

    def __post_init__(self) -> None:
        if not self.bind.startswith(("tcp://", "inproc://")):
            raise ConfigError(
                f"transfer.bind must be tcp://HOST:PORT or inproc://NAME, got {self.bind!r}"
            )
        if self.slot_bytes < 4096 or self.slot_bytes % 4096:
            raise ConfigError(
                f"transfer.slot_bytes must be a multiple of 4096, got {self.slot_bytes}"
            )
        if self.arena_bytes < self.slot_bytes:
            raise ConfigError(
                f"transfer.arena_bytes must hold a slot of {self.slot_bytes} bytes, "
                f"got {self.arena_bytes}"
            )
        for name in ("window_slots", "bulk_sockets", "copy_threads", "max_transfers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"transfer.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.stall_s < self.decide_s:
            raise ConfigError(
                f"transfer.stall_s must lie between 0 and decide_s, "
                f"got {self.stall_s} and {self.decide_s}"
            )

    @property
    def num_slots(self) -> int:
        return self.arena_bytes // self.slot_bytes
