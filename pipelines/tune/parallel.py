"""One training in several processes: each computes the gradient of its share of a step's sequences, and the leader updates.

The leader is the process that runs the job; helpers hold the same model and the same steps, receive what is trained before
each step and send their gradient back, so checkpoints, figures and files stay the leader's alone, and a helper that dies
loses nothing. Sums are those of one process up to rounding. Transport and device come from accelerate (gloo on a CPU, NCCL on
GPUs, one for each process). With `schedule.shard_weights` each process holds only its share of the frozen layers.

    make finetune NPROC=2        # llmlab finetune --processes 2
    make finetune MODEL=mistral-7b RECIPE=lora-fsdp NPROC=4
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.architecture import decoder_of, layers_of
from pipelines.config import ROOT
from pipelines.errors import OutOfMemory, TrainingFailed

if TYPE_CHECKING:
    import torch

    from pipelines.tune.finetune import Job

T = TypeVar("T")
LEADER = 0


class Team:
    """The processes of one training; every method is called by all of them, in the same order.

    Attributes:
        rank: 0 for the leader.
        size: how many there are.
        device: "cpu" or "cuda"; of the latter each has its own.
        sharded: the layers are spread over all, so every pass through the model is made by all at once.
    """

    def __init__(self, rank: int = LEADER, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device, self.sharded = rank, size, device, False

    def shard(self, model: Any) -> None:
        """Spread the frozen weights of each decoder layer over the processes; a layer is whole only while it computes.

        FSDP2 (Zhao et al. 2023, arXiv 2304.11277). What is trained, embeddings and the last norm stay whole everywhere: an
        adapter is small, and its gradients go the same way as without shards.

        Args:
            model: a PEFT model with plain weights, in main memory; afterwards on this process's device.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        base = model.get_base_model()
        layers, decoder = layers_of(base), decoder_of(base)
        spread = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
        whole = {p for p in model.parameters() if p not in spread}
        mesh = init_device_mesh(self.device, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(decoder, mesh=mesh, ignored_params=whole)  # it holds nothing, and fetches a layer ahead of its turn
        for p in whole:
            p.data = p.data.to(self.device)
        self.sharded = True

    def rounds(self, sequences: Sequence[T], at_once: int) -> Iterator[tuple[Sequence[T], float]]:
        """Yield (sequences that this process computes together, weight of their loss).

        Of a sharded model all make equally many passes; those who have nothing left make one that weighs nothing.
        """
        own = sequences[self.rank :: self.size]
        passes = -(-len(sequences) // self.size) if self.sharded else len(own)
        for first in range(0, passes, at_once):
            yield (own[first : first + at_once], 1.0) if first < len(own) else (sequences[:1], 0.0)

    def agree(self, number: int) -> int:
        """Return the leader's number."""
        import torch

        value = torch.tensor(number, device=self.device)
        self._collect(lambda distributed: distributed.broadcast(value, LEADER))
        return int(value)

    def meet(self) -> None:
        """Wait until every process is here."""
        self.agree(0)

    def spread(self, trained: Mapping[str, torch.Tensor]) -> None:
        """Give every process the leader's weights."""
        import torch

        with torch.no_grad():
            flat = torch.cat([p.flatten().float() for p in trained.values()]) if self.size > 1 else None
            self._collect(lambda distributed: distributed.broadcast(flat, LEADER))
            if flat is not None and self.rank != LEADER:
                for p, part in zip(trained.values(), flat.split([p.numel() for p in trained.values()]), strict=True):
                    p.copy_(part.view_as(p))

    def gather(self, trained: Mapping[str, torch.Tensor], loss: float) -> float:
        """Add the gradients of all processes up in the leader, and return the sum of their losses there."""
        import torch

        if self.size == 1:
            return loss
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()]
        flat = torch.cat([*(g.flatten().float() for g in grads), torch.tensor([loss], device=grads[0].device)])
        self._collect(lambda distributed: distributed.reduce(flat, LEADER))
        for p, part in zip(trained.values(), flat[:-1].split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        return float(flat[-1])

    def _collect(self, work: Any) -> None:
        """Do one collective operation; alone there is nothing to do."""
        if self.size == 1:
            return
        import torch.distributed

        try:
            work(torch.distributed)
        except RuntimeError as error:
            raise TrainingFailed(f"a process of the training is gone: {str(error).splitlines()[0]}", "all of them to the end",
                                 "the same command again goes on from the last checkpoint") from None  # fmt: skip


@contextmanager
def team(job: Job, processes: int) -> Iterator[Team]:
    """Start the helpers of a job, and end them with the block.

    Args:
        job: what all processes work on.
        processes: how many, the leader included; 1 starts nothing.
    """
    if processes == 1:
        yield Team()
        return
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "pipelines.tune.parallel", json.dumps(asdict(job))]
    helpers = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdin=subprocess.DEVNULL, start_new_session=True)
        for rank in range(1, processes)
    ]  # fmt: skip
    try:
        os.environ |= environment | {"RANK": "0", "LOCAL_RANK": "0"}
        yield _join()
    finally:
        _leave()
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.wait()
        for name in (*environment, "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)


def _join() -> Team:
    from accelerate import PartialState

    from pipelines import hardware

    state = PartialState(cpu=hardware.choose_device().choice == "cpu")
    return Team(state.process_index, state.num_processes, state.device.type)


def _leave() -> None:
    import torch.distributed
    from accelerate.state import PartialState

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    PartialState._reset_state()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(job: str) -> None:
    """Help with a job until the leader is done."""
    from pipelines.tune.finetune import Job, assist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides
    try:
        assist(Job(**json.loads(job)), _join())
    except OutOfMemory as error:
        sys.exit(str(error))
    except TrainingFailed:  # the leader is gone, and says why
        pass


if __name__ == "__main__":
    main(sys.argv[1])
