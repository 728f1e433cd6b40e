"""How a process of a launch ends."""

import subprocess
import sys

import pytest
from tiny_runs import environment

# Two processes that end, of a launch of one and of two: forked, to import once. Standard output goes to a file for each.
SCRIPT = """
import atexit, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

from modeling_gppc.training.launch import leave

for n_processes in (1, 2):
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit(0)
os.dup2(os.open(str(n_processes), os.O_CREAT | os.O_WRONLY), 1)

class Late:
    def __del__(self):
        print("interpreter ended", flush=True)

late = Late()
# One write each: `print` ends a line with a second one, and another thread may write in between.
ThreadPoolExecutor(1).submit(sys.stdout.write, "pool ")
threading.Thread(target=lambda: (time.sleep(0.2), sys.stdout.write("thread "))).start()
atexit.register(sys.stdout.write, "logger ")
sys.stdout.write("work ")
leave(3, n_processes)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Folder with what each process wrote."""
    folder = tmp_path_factory.mktemp("ended")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, env=environment())
    assert done.stdout.split() == ["3", "3"], done.stderr
    return folder


@pytest.mark.parametrize("n_processes", [1, 2])
def test_leave_loses_nothing_and_skips_the_interpreters_end(ended, n_processes):
    written = (ended / str(n_processes)).read_text()
    # Among several processes nothing is left alive that Gloo's threads could meet while the interpreter ends.
    assert ("interpreter ended" in written) == (n_processes == 1)
    words = written.replace("interpreter ended", "").split()
    assert sorted(words) == ["logger", "pool", "thread", "work"] and words[-2:] == ["thread", "logger"]
