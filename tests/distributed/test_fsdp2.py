"""Sharded training with `fully_shard` on two CPU processes, and the committed accelerate files."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fsdp2_worker import fit, make, predict
from tiny_runs import (
    arguments,
    distance,
    free_port,
    last_weights,
    launcher,
    logged,
    run,
    train_module,
    write_run_pairs,
)

from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.modeling_gppc import GppcPreTrainedModel
from modeling_gppc.training.arguments import CONFIGS


def test_sharded_training_equals_one_process(tmp_path):
    pairs = write_run_pairs(tmp_path / "pairs")
    worker = Path(__file__).with_name("fsdp2_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run([*torchrun, str(worker), str(pairs), str(tmp_path / "model")])
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "model" / "predicted.pt", weights_only=True)
    assert saved["world"] == 2 and saved["local"] <= 0.6 * saved["all"]
    # The saved folder loads in one process and predicts the same.
    folder = PairFolder(pairs)
    loaded = GppcForPerturbationPrediction.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(predict(loaded, folder), saved["predicted"], atol=1e-6, rtol=0)
    # One process on the same global batches learned the same, and learned something.
    alone = make(folder)
    fresh = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    fit(alone, folder)
    assert distance(alone.state_dict(), loaded.state_dict()) < 1e-5 < distance(fresh, alone.state_dict())


@pytest.mark.slow
def test_the_committed_file_trains_resumes_and_saves(tmp_path):
    pairs = write_run_pairs(tmp_path / "pairs")
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_module().main(arguments(pairs, one)) == 0
    settings = ["--config_file", str(CONFIGS / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"]
    launch = [*launcher(2)[:4], *settings, "--main_process_port", str(free_port())]
    script = str(Path(__file__).with_name("fsdp2_launch.py"))
    flags = arguments(pairs, two, training__per_device_train_batch_size=8)
    tests = str(Path(__file__).parents[1])
    for resume in ([], ["--resume"]):
        done = run([*launch, script, *flags, *resume], path=tests)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (two / "checkpoint-50" / "pytorch_model_fsdp.bin").is_file()  # it was sharded
        for name, tolerance in (("loss", 1e-5), ("eval_mse", 1e-6)):
            assert logged(one, name) == pytest.approx(logged(two, name), abs=tolerance)
        assert distance(last_weights(one), last_weights(two)) < 1e-5
        models = [GppcForPerturbationPrediction.from_pretrained(out / "model") for out in (one, two)]
        assert distance(models[0].state_dict(), models[1].state_dict()) < 1e-5
        shutil.rmtree(two / "checkpoint-50")  # the second time it has something to do


ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def test_accelerate_files_are_those_documented():
    assert [path.stem for path in ACCELERATE] == ["cpu_2proc", "ddp", "fsdp2", "multi_node", "single_gpu"]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_files_are_read_as_meant(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    content = yaml.safe_load(path.read_text())
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert defaults.num_processes == content["num_processes"]
    assert arguments.multi_gpu == (content["distributed_type"] == "MULTI_GPU")
    assert arguments.use_fsdp == (content["distributed_type"] == "FSDP")
    assert not arguments.use_cpu  # that launcher would start one process
    if arguments.use_fsdp:
        assert arguments.fsdp_version == 2
        wrapped = arguments.fsdp_transformer_layer_cls_to_wrap.split(",")
        assert wrapped == GppcPreTrainedModel._no_split_modules
