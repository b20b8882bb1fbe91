"""torchrun: its processes start apart, and all go on with what rank 0 was told, in rank 0's run folder."""

from __future__ import annotations

import json
import os

from knep.errors import RunFailed

_WAIT = 120  # seconds in which rank 0 must have composed its config


def agreed(arguments: list[str]) -> list[str]:
    """The arguments of rank 0 with its run folder, where torchrun started this process; otherwise `arguments`.

    Each process would find a folder of its own by the time at which it looks at the clock, and a checkpoint of its own
    by the moment at which it looks for the newest. And their collectives meet at a port of this start: torchrun's own
    store still holds the addresses of processes that it has started again, to which gloo would connect for ever.
    Raises RunFailed where rank 0 does not say what it goes on with.
    """
    started = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not started:
        return arguments
    from datetime import timedelta

    from lightning.fabric.plugins.environments.lightning import find_free_network_port
    from torch.distributed import DistStoreError, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"knep/{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_WAIT))
        if os.environ["RANK"] == "0":
            store.set(key, json.dumps([[*arguments, *_place(arguments)], find_free_network_port()]))
        arguments, port = json.loads(store.get(key))
    except DistStoreError as error:
        raise RunFailed(
            f"rank 0 at {address}:{port} did not say within {_WAIT} s what it runs: see its error"
        ) from error
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return arguments


def _place(arguments: list[str]) -> list[str]:
    """The override that says the run folder outright, unless one does."""
    from hydra import compose
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig

    from knep.searchpath import own_hydra
    from knep.typed import quoted

    args = get_args_parser().parse_args(arguments)
    if args.multirun or any(line.startswith("hydra.run.dir=") for line in args.overrides):
        return []
    search = [f"file://{os.path.abspath(args.config_dir)}"] if args.config_dir else []
    with own_hydra(search, ahead=False):
        cfg = compose("train", args.overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return [f"hydra.run.dir={quoted(cfg.hydra.run.dir)}"]
