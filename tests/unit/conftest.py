import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Async tests (marker anyio) run on asyncio alone, as the services do."""
    return "asyncio"
