"""Computed state that is kept for a decode: how long, and whose goes first when room is needed."""

from collections.abc import Iterator

from scission.services.prefill.request import Request


class Retention:
    """The requests whose state is computed and kept; belongs to the engine thread.

    Waiting for a grant, or for a redirect after a transfer that failed, is bounded by a lease; a
    transfer that runs is bounded by its own stall timers. After COMMIT the state stays for a short
    lease, in which the request can still be redirected, but gives way to prompts that need room.
    """

    def __init__(self, retain_lease_s: float, commit_lease_s: float) -> None:
        self._retain_lease_s = retain_lease_s
        self._commit_lease_s = commit_lease_s
        self._requests: dict[Request, None] = {}  # in order of computation
        self._committed: dict[Request, None] = {}  # in order of commit

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def keep(self, request: Request, now: float) -> None:
        """From now on, or anew: for a grant or a redirect, as long as the lease lasts."""
        self._requests[request] = None
        self._committed.pop(request, None)
        request.is_committed = False
        request.lease_until = now + self._retain_lease_s

    def ship(self, request: Request) -> None:
        """The transfer is granted: no lease runs while it does."""
        request.lease_until = None

    def commit(self, request: Request, now: float) -> None:
        """A decode has the state."""
        self._committed[request] = None
        request.is_committed = True
        request.lease_until = now + self._commit_lease_s

    def remove(self, request: Request) -> None:
        self._requests.pop(request, None)
        self._committed.pop(request, None)

    def first_committed(self) -> Request | None:
        """Whose state can be spared first."""
        return next(iter(self._committed), None)
