"""Where ranks meet that torchrun has started again; who was started alone and should not be."""

from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from phi3v.errors import ConfigError
from phi3v.ranks import _meeting_place
from phi3v.training.preflight import refuse_other_launchers


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


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_accelerate_has_started_alone_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """By the environment that accelerate's own launcher makes for the process that it starts."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    asked = ["--cpu", f"--num_processes={count}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    given = launch_command_parser().parse_args([*asked, "-m", "phi3v", "train", "recipe.yaml"])
    _validate_launch_command(given)
    for name, value in prepare_simple_launcher_cmd_env(given)[1].items():
        monkeypatch.setenv(name, value)
    line = (
        "accelerate launch .* started this one alone.* torchrun --nproc-per-node=2 -m phi3v train, .*--num_processes=1$"
    )
    with pytest.raises(ConfigError, match=line) if count > 1 else nullcontext():
        refuse_other_launchers()
    monkeypatch.setenv("WORLD_SIZE", "1")  # of a cluster that starts one process, and says so
    refuse_other_launchers()
