"""Where ranks meet that torchrun has started again."""

from datetime import timedelta

import pytest
import torch

from phi3v.ranks import _meeting_place


def test_ranks_that_are_started_again_do_not_read_old_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent of torchrun keeps one store over all starts; its ranks are clients of it."""
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent.set("address of rank 0", "of one that is gone")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "RANK": "0", "WORLD_SIZE": "2"}
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1", "GROUP_WORLD_SIZE": "1"}
    for name, value in {**place, **torchrun}.items():
        monkeypatch.setenv(name, value)
    met = _meeting_place(timedelta(seconds=20))
    assert (met["rank"], met["world_size"]) == (0, 2) and not met["store"].check(["address of rank 0"])
    met["store"].set("address of rank 0", "mine")
    assert agent.get("start 1/address of rank 0") == b"mine"
    for name, value in (("TORCHELASTIC_RESTART_COUNT", "0"), ("GROUP_WORLD_SIZE", "2")):
        with monkeypatch.context() as other:
            other.setenv(name, value)
            assert _meeting_place(None) == {}
