"""`train.py --push_to_hub`: what a run leaves is what the Hub gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import arguments, launcher, run, write_run_pairs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_pushed_and_a_refused_push_loses_nothing(hub, tmp_path):
    def train(token, *flags):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "home", token)}
        command = [sys.executable, "train.py", "--training.max_steps", "2", "--output_dir", str(tmp_path / "run")]
        return subprocess.run(
            [*command, "--push_to_hub", "tester/model", *flags],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )

    result = train("hf_wrong")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("train.py: error: the token was refused by")
    folder = tmp_path / "run" / "model"
    assert (folder / "model.safetensors").is_file()
    result = train("hf_test_token", "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    files = hub.files("model", "tester/model")
    local = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(files) - {".gitattributes"} == local - {"run.json", "training_log.json"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    results = json.loads(files["results.json"])
    for content in results["splits"].values():
        assert f"{content['methods']['gppc']['mse']:.4f}" in files["README.md"].decode()
    assert len(hub.history("model", "tester/model")) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_push_in_the_background_as_one(hub, tmp_path):
    """Nothing waits for an upload: a checkpoint that is saved during one is left to the next."""
    flags = arguments(
        write_run_pairs(tmp_path / "pairs"),
        tmp_path / "run",
        training__per_device_train_batch_size=8,
        training__eval_steps=10,
        training__save_steps=10,
    )
    done = run(
        [*launcher(2), *flags, "--push_to_hub", "tester/model", "--hub_strategy", "every_save"],
        **hub.environment(tmp_path / "home", "hf_test_token"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, *pushed, last = hub.history("model", "tester/model")
    assert (first, last) == ("initial commit", "Upload with gppc push")
    assert pushed and set(pushed) <= {f"Training, step {step}" for step in (10, 20, 30, 40, 50)}
    assert len(set(pushed)) == len(pushed)
    files = hub.files("model", "tester/model")
    assert files["model.safetensors"] == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert "Training is not finished" not in files["README.md"].decode()
