"""Faults of the pair build: an error or a correct resume, never a wrong or silently shorter data set."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs, exclusive
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from data_scripts.synthetic.network import SyntheticConfig
    from data_scripts.synthetic.network_store import write_synthetic

    path = tmp_path_factory.mktemp("faults") / "store"
    write_synthetic(path, SyntheticConfig(form="count", n_cells=400, n_genes=60), progress=False)
    return path


def mapping_for(store) -> dict:
    rules = [{"by": "cell", "fractions": {"test": 0.2, "validation": 0.1}}]
    return {"query": {"uri": str(store)}, "shard_cells": 25, "splits": {"rules": rules}}


def options_for(store) -> PairOptions:
    return from_mapping(PairOptions, mapping_for(store))


@pytest.fixture(scope="module")
def reference(store, tmp_path_factory):
    began = time.perf_counter()
    folder = build_pairs(options_for(store), tmp_path_factory.mktemp("reference") / "out", progress=False)
    return folder.manifest, time.perf_counter() - began


def killed_builds(store, reference, folder: Path, n_kills: int, limits: list[int]) -> dict:
    """What `kill_builds.py` prints of builds below `folder`."""
    task = {"options": mapping_for(store), "out": str(folder / "out"), "n_kills": n_kills, "limits": limits}
    (folder / "task.json").write_text(json.dumps(task | {"seconds": min(reference[1], 2.0), "seed": 0}))
    command = [sys.executable, str(Path(__file__).with_name("kill_builds.py")), str(folder / "task.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == n_kills and result["digests"] == [reference[0]["digest"]]
    assert result["leftovers"] == []
    return result


LIMITS = [2_000, 12_000]


@pytest.fixture(scope="module")
def faults(store, reference, tmp_path_factory):
    """Folder of builds that were killed or had no room, and what was printed of them."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, killed_builds(store, reference, folder, 3, LIMITS)


def test_killed_builds_resume_to_the_same_bytes(faults):
    assert faults[1]["kills"] == 3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills(store, reference, tmp_path):
    killed_builds(store, reference, tmp_path, 20, [])


@pytest.mark.slow
def test_workers_end_with_a_killed_build(store, reference, tmp_path):
    command = "import sys; from gppc.cli import main; sys.exit(main(sys.argv[1:]))"
    config = tmp_path / "pairs.yaml"
    config.write_text(json.dumps(mapping_for(store)))
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", command, "build-pairs", str(out), "--config", str(config), "--num-proc", "2"]
    build = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: list((out / "work").glob("panel-*.npz")))
    workers = children_of(build.pid)
    assert len(workers) >= 2
    build.send_signal(signal.SIGKILL)
    build.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    folder = build_pairs(options_for(store), out, num_proc=2, progress=False)
    assert folder.manifest["digest"] == reference[0]["digest"]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("limit", LIMITS)
def test_full_disk(store, reference, faults, limit):
    folder, result = faults
    out = folder / f"out-{limit}"
    status, errors = result["limited"][LIMITS.index(limit)]
    assert status == 2 and "error" in errors.splitlines()[-1], errors
    with pytest.raises(ValueError, match="is not a pairs folder"):
        PairFolder(out)
    folder = build_pairs(options_for(store), out, progress=False)
    assert folder.manifest["digest"] == reference[0]["digest"]


def small_disk_works() -> bool:
    """Whether a process may mount a file system of its own, in a namespace of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not small_disk_works(), reason="no file system can be mounted here")
@pytest.mark.parametrize("kilobytes", [100, 300])
def test_a_disk_that_is_really_full(store, reference, tmp_path, kilobytes):
    config, disk, kept = tmp_path / "pairs.yaml", tmp_path / "disk", tmp_path / "kept"
    config.write_text(json.dumps(mapping_for(store)))
    disk.mkdir()
    build = "import sys; from gppc.cli import main; sys.exit(main(sys.argv[1:]))"
    # The disk ends with its namespace: what the build left on it is copied out first.
    script = (
        f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk} || exit 99; "
        f"{sys.executable} -c '{build}' build-pairs {disk}/out --config {config}; status=$?; "
        f"cp -r {disk}/out {kept}; exit $status"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 2 and "No space left" in done.stderr.splitlines()[-1], done.stderr
    with pytest.raises(ValueError, match="is not a pairs folder"):
        PairFolder(kept)
    folder = build_pairs(options_for(store), kept, progress=False)
    folder.verify()
    assert folder.manifest["digest"] == reference[0]["digest"]


@pytest.mark.slow
def test_two_processes_into_one_folder(store, reference, tmp_path):
    config, out = tmp_path / "pairs.yaml", tmp_path / "out"
    config.write_text(json.dumps(mapping_for(store)))
    command = "import sys; from gppc.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", command, "build-pairs", str(out), "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    builds = [
        subprocess.Popen(
            arguments, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    errors = [build.communicate(timeout=280)[1] for build in builds]
    # One builds; the other is refused, or opens what it finds finished.
    assert 0 in [build.returncode for build in builds]
    for build, error in zip(builds, errors):
        assert build.returncode == 0 or "is being written by another build" in error
    folder = PairFolder(out)
    folder.verify()
    assert folder.manifest["digest"] == reference[0]["digest"]


def copy_of(store, tmp_path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    return copy


def test_truncated_store(store, tmp_path):
    copy = copy_of(store, tmp_path)
    files = [path for path in copy.rglob("*") if path.is_file() and "/raw/" in str(path) and path.suffix == ".tdb"]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(ValueError, match="damaged"):
        build_pairs(options_for(copy), tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_store_without_some_of_its_values(store, tmp_path):
    copy = copy_of(store, tmp_path)
    for kind in ("__fragments", "__commits"):
        found = sorted(path for path in copy.rglob(f"raw/{kind}/*"))
        assert found
        for path in found[len(found) // 2 :]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=r"obs\.nnz says .*the store is damaged"):
        build_pairs(options_for(copy), tmp_path / "out", progress=False)


def test_a_store_that_changed_is_another_run(store, tmp_path):
    copy = copy_of(store, tmp_path)
    build_pairs(options_for(copy), tmp_path / "out", progress=False)
    (copy / "census_info" / "extra").write_text("x")
    with pytest.raises(ValueError, match=r"holds another run \(store was"):
        build_pairs(options_for(copy), tmp_path / "out", progress=False)


def test_damaged_shard_is_noticed(store, tmp_path):
    folder = build_pairs(options_for(store), tmp_path / "out", progress=False)
    shard = folder.path / folder.manifest["splits"]["train"]["shards"][3]["file"]
    shard.unlink()
    with pytest.raises(ValueError, match="is damaged: no file"):
        PairFolder(tmp_path / "out")


def test_two_builds_into_one_folder(store, reference, tmp_path):
    with exclusive(tmp_path / "out"), pytest.raises(ValueError, match="is being written by another build"):
        build_pairs(options_for(store), tmp_path / "out", progress=False)
    outcomes = []

    def build():
        try:
            outcomes.append(build_pairs(options_for(store), tmp_path / "out", progress=False).manifest["digest"])
        except ValueError as error:
            outcomes.append("refused" if "another build" in str(error) else str(error))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reference[0]["digest"] in outcomes and set(outcomes) <= {reference[0]["digest"], "refused"}


@pytest.mark.slow
def test_dask_cluster_that_loses_a_worker(store, reference, tmp_path):
    from dask.distributed import Client, LocalCluster

    out = tmp_path / "out"
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            workers = client.run(os.getpid)

        def kill_one():
            wait_for(lambda: list((out / "work").glob("panel-*.npz")))
            os.kill(next(iter(workers.values())), signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        folder = build_pairs(options_for(store), out, progress=False, dask=cluster.scheduler_address)
        killer.join()
    assert folder.manifest["digest"] == reference[0]["digest"]
    folder.verify()


def test_dask_scheduler_that_does_not_answer(store, tmp_path):
    with pytest.raises(ValueError, match=r"`dask` tcp://127\.0\.0\.1:9 is no scheduler that answers"):
        build_pairs(options_for(store), tmp_path / "out", progress=False, dask="tcp://127.0.0.1:9")
