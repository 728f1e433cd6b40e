"""Trains a tiny model sharded by `fully_shard` over gloo, gathers it and saves it: PAIRS OUT."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.modeling_gppc import IGNORED_LABEL
from modeling_gppc.training.launch import leave
from modeling_gppc.training.trainer import EpochSampler

STEPS, BATCH = 20, 16
SIZES = {
    "num_factors": 3,
    "num_components": 2,
    "num_latents": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "readout_size": 8,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
}


def make(folder: PairFolder) -> GppcForPerturbationPrediction:
    """The same fresh model in every process."""
    torch.manual_seed(0)
    return GppcForPerturbationPrediction(
        GppcConfig(vocab_size=folder.genes.num_rows, pairings=folder.pairings, **SIZES)
    )


def shard(model: GppcForPerturbationPrediction) -> GppcForPerturbationPrediction:
    """Shards each block, then the rest, as `_no_split_modules` and the committed accelerate file say."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fit(model, folder: PairFolder, rank: int = 0, world: int = 1) -> None:
    """Some steps on this process's rows of every global batch."""
    rows = PairDataset(folder.split("train"), folder.pairings)
    collate = PairCollator(folder.panels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = list(EpochSampler(rows, BATCH, seed=0))
    model.train()
    for step in range(STEPS):
        start = step * BATCH % len(order)
        mine = order[start : start + BATCH][rank * BATCH // world : (rank + 1) * BATCH // world]
        batch = collate(rows.__getitems__(mine))
        scored = (batch["labels"] != IGNORED_LABEL).sum()
        if world > 1:
            dist.all_reduce(scored)
        loss = model(**batch, num_items_in_batch=scored).loss * world  # gradients are averaged over processes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def predict(model, folder: PairFolder) -> torch.Tensor:
    """Predictions of the test rows."""
    rows = PairDataset(folder.split("test"), folder.pairings)
    batch = PairCollator(folder.panels)(rows.__getitems__(range(len(rows))))
    with torch.no_grad():
        return model.eval()(**batch).logits


def main() -> None:
    folder, out = PairFolder(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    model = shard(make(folder))
    if not isinstance(model, FSDPModule):
        raise RuntimeError("the model is not sharded")
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    fit(model, folder, dist.get_rank(), dist.get_world_size())
    predicted = predict(model, folder)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        whole = make(folder)
        whole.load_state_dict(weights)
        whole.save_pretrained(out)
        facts = {"world": dist.get_world_size(), "local": local, "all": whole.num_parameters()}
        torch.save({"predicted": predicted, **facts}, out / "predicted.pt")
    dist.barrier()
    leave(0, dist.get_world_size())


if __name__ == "__main__":
    main()
