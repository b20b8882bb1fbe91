"""torchrun: its processes start apart, and all go on with what rank 0 was told, in rank 0's run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from knep.errors import RunFailed

_WAIT = 120  # seconds in which rank 0 must have composed its config


def agreed(arguments: list[str], place: Callable[[], list[str]]) -> list[str]:
    """The arguments with the lines of `place` that say where the run goes; rank 0's, where torchrun started several.

    Each process would find a folder of its own by the time at which it looks at the clock, and a checkpoint of its own
    by the moment at which it looks for the newest. And their collectives meet at a port of this start: torchrun's own
    store still holds the addresses of processes that it has started again, to which gloo would connect for ever.
    Raises RunFailed where rank 0 does not say what it goes on with.
    """
    if not under_torchrun():
        return [*arguments, *place()]
    from datetime import timedelta

    from lightning.fabric.plugins.environments.lightning import find_free_network_port
    from torch.distributed import DistStoreError, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"knep/{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_WAIT))
        if os.environ["RANK"] == "0":
            store.set(key, json.dumps([[*arguments, *place()], find_free_network_port()]))
        arguments, port = json.loads(store.get(key))
    except DistStoreError as error:
        raise RunFailed(
            f"rank 0 at {address}:{port} did not say within {_WAIT} s what it runs: see its error"
        ) from error
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return arguments


def under_torchrun() -> bool:
    """Whether torchrun started this process and others, which have its store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ.get("WORLD_SIZE", "1")) > 1


def started_apart() -> bool:
    """Whether this process is one of several that something else started, which must find the same run folder."""
    counts = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    return any(count.isdecimal() and int(count) > 1 for count in counts)
