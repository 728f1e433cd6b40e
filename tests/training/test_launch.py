"""How a process of a launch ends."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

from modeling_gppc.training.launch import leave

class Late:
    def __del__(self):
        print("interpreter ended", flush=True)

late = Late()
# One write each: `print` ends a line with a second one, and another thread may write in between.
ThreadPoolExecutor(1).submit(sys.stdout.write, "pool ")
threading.Thread(target=lambda: (time.sleep(0.2), sys.stdout.write("thread "))).start()
atexit.register(sys.stdout.write, "logger ")
sys.stdout.write("work ")
leave(3, int(sys.argv[1]))
"""


@pytest.mark.parametrize("n_processes", [1, 2])
def test_leave_loses_nothing_and_skips_the_interpreters_end(n_processes):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(n_processes)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    # Among several processes nothing is left alive that Gloo's threads could meet while the interpreter ends.
    ended = "interpreter ended" in done.stdout
    assert ended == (n_processes == 1)
    words = done.stdout.replace("interpreter ended", "").split()
    assert sorted(words) == ["logger", "pool", "thread", "work"] and words[-2:] == ["thread", "logger"]
