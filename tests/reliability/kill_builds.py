"""Kills a pair build again and again; run as a process of its own: OPTIONS.json OUT N_KILLS SECONDS SEED.

The libraries are imported once and every build is a fork made before any store is opened, so that a killed build costs
no start-up and the moments of death fall into the build.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions


def fork_build(options: PairOptions, out: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        build_pairs(options, out, progress=False)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    options = from_mapping(PairOptions, json.loads(Path(sys.argv[1]).read_text()))
    out, n_kills, seconds = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    rng = random.Random(int(sys.argv[5]))
    kills, finished, digests = 0, 0, set()
    while kills < n_kills:
        child = fork_build(options, out)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif os.WEXITSTATUS(status):
            sys.exit("a build failed instead of resuming")
        if (out / "manifest.json").exists():
            folder = PairFolder(out)  # refuses what is damaged
            folder.verify()
            digests.add(folder.manifest["digest"])
            finished += 1
            shutil.rmtree(out)
    _, status = os.waitpid(fork_build(options, out), 0)
    folder = PairFolder(out)
    folder.verify()
    digests.add(folder.manifest["digest"])
    leftovers = [str(path) for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == "work"]
    print(json.dumps({"kills": kills, "finished": finished, "digests": sorted(digests), "leftovers": leftovers}))


if __name__ == "__main__":
    main()
