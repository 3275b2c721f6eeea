"""Who may own a run directory."""

import json
import os
import socket
import subprocess
import sys

import pytest

from ssm_train.errors import InputError
from ssm_train.lock import own


def test_a_second_owner_is_refused_until_the_first_is_done(tmp_path):
    run = tmp_path / "run"
    with own(run):
        with pytest.raises(InputError, match=f"process {os.getpid()} owns"), own(run):
            pass
        assert (tmp_path / "run.lock").exists(), "a refused process removes nothing"
    assert not (tmp_path / "run.lock").exists()
    with own(run):
        pass


def test_a_living_process_is_respected_and_a_dead_one_is_not(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": other.pid}))
    with pytest.raises(InputError, match=f"process {other.pid} owns"), own(tmp_path / "run"):
        pass
    other.communicate(b"\n")
    with own(tmp_path / "run"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_another_host_is_believed(tmp_path):
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(InputError, match="on host elsewhere.*run.lock"), own(tmp_path / "run"):
        pass


def test_an_error_inside_releases_and_a_torn_file_is_named(tmp_path):
    with pytest.raises(ZeroDivisionError), own(tmp_path / "run"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "run.lock").exists()
    (tmp_path / "run.lock").write_text("{")
    with pytest.raises(InputError, match="cannot be read; remove it"), own(tmp_path / "run"):
        pass
