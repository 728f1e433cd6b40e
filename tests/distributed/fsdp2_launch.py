"""train.py with accelerate's FSDP2 on CPUs: accelerate itself takes that road on accelerators only."""

import os

from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny_runs import train_module

from modeling_gppc.training.launch import leave

original = AcceleratorState.__init__


def on_cpu_too(self, *args, **kwargs):
    """As accelerate does for several GPUs."""
    original(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if self.distributed_type == DistributedType.MULTI_CPU and plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = on_cpu_too
    leave(train_module().main(), int(os.environ["WORLD_SIZE"]))
