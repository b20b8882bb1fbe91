"""Whatever a killed process had started ends by itself: its end is seen by the end of a pipe that all of it holds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKERS = """
import sys, time
import numpy, torch
from torch.utils.data import Dataset
from knep.data.folder_loader import FolderLoader
from knep.data.loaders import Batches

class Slow(Dataset):
    def __getitem__(self, batch):
        if batch[0][0] >= 40:
            print("busy", flush=True)
            time.sleep(600)
        return torch.zeros(1 << 20), torch.zeros(1)

loader = FolderLoader(Slow(), Batches(1000, 10), 2)
for _ in loader:
    time.sleep(0.1)
"""
ENDLESS = "import os, time; print('busy', flush=True); [None for _ in iter(int, 1)]"
CHILDREN = {
    "data workers": WORKERS,
    "by the kernel": f"""
import subprocess, sys, os, time
child = "from knep.utils.orphans import killed_with; import os; killed_with(os.getppid()); {ENDLESS}"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
""",
    "by looking": f"""
import subprocess, sys, os, time
child = "from knep.utils.orphans import ends_with_parent; import os; ends_with_parent(os.getppid()); {ENDLESS}"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
""",
    "a process of a training that has not joined yet": """
import subprocess, sys, os, time
os.environ |= {"KNEP_LAUNCHER": str(os.getpid()), "LOCAL_RANK": "1"}
wait = "lambda a: print('busy', flush=True) or time.sleep(600)"
child = "import knep.cli.train as t, time\\nt._start = " + wait + "\\nt.main(['x=1'])"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
""",
}


@pytest.mark.parametrize("name", CHILDREN)
def test_the_children_of_a_killed_process_end(name):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", CHILDREN[name]], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline() == b"busy\n"
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # returns when the last of them has closed it


def test_a_child_that_finds_its_parent_gone_does_not_begin():
    code = "import os; from knep.utils.orphans import killed_with; killed_with(os.getppid() + 1); print('began')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (1, b"")
