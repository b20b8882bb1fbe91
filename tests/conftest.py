import os
import signal

import pytest
import torch

from tests.cells import mark_slow

# Two test processes share two cores; sums over threads would also differ from machine to machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# A shell gives what it starts in the background an ignored Ctrl-C, which runs would leave ignored.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--part", metavar="I/N", help="of the tests chosen, every N-th alone, from the I-th on: 1/3")


@pytest.hookimpl(wrapper=True)  # before -m chooses, and after it: what it leaves is counted
def pytest_collection_modifyitems(config, items):
    mark_slow(items)
    yield
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    part = config.getoption("--part")
    if part:
        mine, of = map(int, part.split("/"))
        items[:] = items[mine - 1 :: of]
