"""Kills a pair build again and again, and lets disks fill: run as a process of its own, TASK.json.

The task names the build's `options`, the folder `out`, `n_kills` within so many `seconds` and the `seed` of the moments,
and `limits`: bytes that no file may exceed, which fails a write where a full disk would; each has the folder `out-LIMIT`.

The libraries are imported once and every build is a fork made before any store is opened, so that a killed build costs
no start-up and the moments of death fall into the build.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions
from gppc import cli


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


def build_on_a_full_disk(config: Path, out: Path, limit: int) -> tuple[int, str]:
    """Exit status and errors of `gppc build-pairs` in a process whose files may not grow beyond `limit` bytes."""
    errors = out.with_suffix(".err")
    child = os.fork()
    if not child:
        with open(errors, "w") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        status = cli.main(["build-pairs", str(out), "--config", str(config)])
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text()


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    options, out = from_mapping(PairOptions, task["options"]), Path(task["out"])
    config = out.with_name("options.json")
    config.write_text(json.dumps(task["options"]))
    limited = [build_on_a_full_disk(config, out.with_name(f"out-{limit}"), limit) for limit in task["limits"]]
    n_kills, seconds, rng = task["n_kills"], task["seconds"], random.Random(task["seed"])
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
    result = {"kills": kills, "finished": finished, "digests": sorted(digests), "leftovers": leftovers}
    print(json.dumps(result | {"limited": limited}))


if __name__ == "__main__":
    main()
