"""What happens if there is no network, and which names can be on the hub."""

import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from processes import HANG_SECONDS

from engine import hub
from engine.hub import check_hub_name, find_network_problem, reporting_hub_errors

FILES = ["mine.jsonl", "rows.json.gz", "data/deep/rows", "./x", "~/x", "a\\b", "run/lora.pt", ""]


def test_file_names_are_not_looked_up_on_the_hub():
    """A name that can only be a file is an error without a request. Others may be on the hub."""
    for name in FILES:
        with pytest.raises(FileNotFoundError, match=r"there is no .*; expected a file"):
            check_hub_name(name, "a file")
    for name in ("gpt2", "openai-community/gpt2-xl"):
        check_hub_name(name, "a file")


def test_without_a_connection_one_request_decides(monkeypatch):
    """If one request fails, the hub's libraries use only their cache in `reporting_hub_errors`.
    The error says why the request failed and what the user can do.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "find_network_problem", lambda: "no route")
    seen = []

    def load() -> None:
        with reporting_hub_errors("x", "Do this"):
            seen.append(constants.HF_HUB_OFFLINE)
            raise OSError("set HF_HUB_OFFLINE=0")

    with pytest.raises(ConnectionError, match=r"x: there is no connection \(no route\).* Do this"):
        load()
    assert seen == [True]
    assert not constants.HF_HUB_OFFLINE


def test_one_request_finds_the_network_problem(monkeypatch):
    """find_network_problem returns None if the hub answers, else why the request failed or hung."""
    session = SimpleNamespace(head=lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    assert find_network_problem() is None
    session.head = None
    assert find_network_problem() == "'NoneType' object is not callable"
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: time.sleep(HANG_SECONDS))
    assert find_network_problem() == "no answer within 0 s"
