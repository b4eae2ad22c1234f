"""What the tests share that hurt real processes."""

import secrets

import pytest

from tests.chaos.harness import PrivateRay
from tests.chaos.processes import marked, wait_for


@pytest.fixture
def ray_of_our_own():
    """A Ray of the test's own, which no process outlives."""
    ray = PrivateRay(secrets.token_hex(8)).start()
    yield ray
    ray.end()
    wait_for(lambda: not marked(ray.mark), 20, "no process outlives its Ray")
