"""Fixtures that several rooms share."""

import os
import socket

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def free_port() -> int:
    """A TCP port on which a rendezvous can listen."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
