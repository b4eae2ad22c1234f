"""Where no Ray answers, whoever would join it is told so in a sentence, within seconds."""

import contextlib
import socket
import time
from unittest import mock

import pytest
import ray

from edit_ray import LongVideoClient
from edit_ray.actors import connection, launch
from edit_ray.cli import main
from edit_ray.errors import ResourcesUnavailable

SECONDS = 15


@contextlib.contextmanager
def listener():
    """Somebody who listens and never says a word, as a Ray whose head was stopped."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def nobody():
    with listener() as address:
        return address


@pytest.fixture(autouse=True)
def _no_ray_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SECONDS


def said(address, tmp_path):
    with pytest.raises(ResourcesUnavailable) as refused:
        LongVideoClient(output=tmp_path, address=address)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_address_of_nobody(tmp_path):
    address = nobody()
    assert f"no Ray answers at {address}, which is the address given" in said(address, tmp_path)
    assert f"no Ray answers at ray://{address}" in said(f"ray://{address}", tmp_path)


def test_a_head_that_does_not_answer(tmp_path):
    with listener() as address:
        assert "what listens there does not answer as Ray's head does" in said(address, tmp_path)


def test_a_variable_that_names_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", nobody())
    assert "which is RAY_ADDRESS" in (sentence := said(None, tmp_path))
    assert "`unset RAY_ADDRESS`" in sentence
    assert said("auto", tmp_path) == sentence


def test_the_address_that_a_dead_ray_has_left(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(nobody())
    sentence = said(None, tmp_path)
    assert "the last Ray started on this machine" in sentence
    assert "`ray stop`" in sentence
    assert "`ray start --head`" in sentence


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:8265", "RAY_ADDRESS is http://127.0.0.1:8265, which is Ray's dashboard; it must be"),
        ("https://head.example:8265/", "such as head.example:6379"),
        ("nonsense", "it must be a host and a port, such as 127.0.0.1:6379"),
        ("127.0.0.1:99999", "no Ray answers at 127.0.0.1:99999"),
        ("no-such-host.invalid:6379", "no Ray answers at no-such-host.invalid:6379"),
    ],
)
def test_what_is_no_address_of_a_head(tmp_path, monkeypatch, address, expected):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert expected in said(None, tmp_path)


def test_a_client_ends_the_actors_of_the_ray_that_it_has_started_and_no_others(tmp_path, monkeypatch):
    """Whoever started a Ray ends it with his process; a scheduler that is being started again is asked anew."""
    answers, ended = [ray.exceptions.RayActorError(), "queued", "queued"], []

    def answer(*_):
        answered = answers.pop(0)
        if isinstance(answered, Exception):
            raise answered
        return answered

    monkeypatch.setattr(connection, "connect_if_running", lambda address: False)
    monkeypatch.setattr(launch, "segment_scheduler", lambda timeout_s: mock.MagicMock())
    monkeypatch.setattr(launch, "answer_of", answer)
    monkeypatch.setattr(launch, "end_actors", lambda: ended.append("all"))
    for starts in (True, False):
        monkeypatch.setattr(connection, "connect", lambda address, starts=starts: starts)
        client = LongVideoClient(output=tmp_path)
        client.submit({"video": {"num_segments": 1}, "prompt_segments": [{"segment": 0, "prompt": "a red circle"}]})
        client.close()
        client.close()
    assert (answers, ended) == ([], ["all"])
    assert list(tmp_path.iterdir()) == [], "no probe is left"


@pytest.mark.parametrize("command", [["cancel", "mine"], ["resume", "mine"], ["down"]])
def test_the_command_line_says_it_in_one_line(tmp_path, capsys, command):
    assert main(["--address", nobody(), "--output", str(tmp_path), *command]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("edit-ray: no Ray answers at 127.0.0.1:")
    assert written.err.count("\n") == 1
