"""The processes of a run: how many there are, whether they are as many as asked for, and errors that all of them see."""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")
# One process may write a store or build pairs for hours while the others wait for it.
PATIENCE = timedelta(hours=24)


@contextlib.contextmanager
def processes(use_cpu: bool) -> Iterator[PartialState]:
    """The processes of a launch, on the CPU where `use_cpu` says so or there is no GPU; `ValueError` if several were
    asked for and the launcher started a single one."""
    refuse_single_process(os.environ)
    on_cpu = {"cpu": True} if use_cpu or not torch.cuda.is_available() else {}
    state = PartialState(**on_cpu, timeout=PATIENCE)
    try:
        yield state
    finally:
        # Among several, `leave` ends the process: its group's end joins Gloo's threads and holds the interpreter's lock,
        # which these may be waiting for.
        if state.num_processes == 1:
            state.destroy_process_group()


def refuse_single_process(environment: dict[str, str]) -> None:
    """Raises a `ValueError` where a launch asked for several processes and made one, which would train on a part only:
    `accelerate launch --cpu --num_processes 2` does (accelerate 1.15), and `srun python train.py` starts several that
    do not know of each other."""
    if any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")):
        return
    if "ACCELERATE_USE_CPU" in environment and "MASTER_PORT" in environment:
        raise ValueError(
            "`accelerate launch` was asked for several processes and started one, as it does with `--cpu`; wanted "
            "`accelerate launch --multi_gpu --num_processes 2 --num_machines 1 train.py --training.use_cpu true` "
            "(`--multi_gpu` on a CPU too), or unset MASTER_PORT for one process."
        )
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        raise ValueError(
            f"`srun` started {tasks} processes that do not know of each other; wanted one task a node that runs "
            "`torchrun`, as in docs/training.md."
        )


def main_first(state: PartialState, function: Callable[[], Result]) -> Result:
    """Calls `function` on the main process, then on the others, where it finds that work done; an error about input is
    raised on all of them with the same words."""
    if state.num_processes == 1:
        return function()
    result, message = None, [None]
    if state.is_main_process:
        try:
            result = function()
        except (ValueError, OSError) as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0] is not None:
        raise ValueError(message[0])
    return result if state.is_main_process else function()


def broadcast_buffers(state: PartialState, model: torch.nn.Module) -> None:
    """Gives every process the main process's buffers: what the closed-form start computed there."""
    if state.num_processes == 1:
        return
    buffers = [{name: buffer.cpu() for name, buffer in model.named_buffers()} if state.is_main_process else None]
    broadcast_object_list(buffers)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[0][name])


def leave(code: int, n_processes: int) -> NoReturn:
    """Ends a process of a launch with a status, without the interpreter's own end where it has others beside it.

    Gloo's threads free the last message after the main thread has gone on; if the interpreter is ending by then, they
    abort the process (PyTorch 2.13, seen in one of 30 launches), and the launcher reports a failed run.
    `destroy_process_group` waits for them with the interpreter's lock held, or not at all: it is left out before this,
    too.
    """
    if n_processes == 1:
        sys.exit(code)
    threading._shutdown()  # these two are what the interpreter does first: threads, then loggers' last values
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
