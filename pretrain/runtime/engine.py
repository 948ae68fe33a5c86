"""The only file that knows how a model is spread over processes.

An engine is built from *our* settings, never from a launcher's flags, and then asserts that what runs is what was asked. It runs
micro-batches and updates; it knows nothing of data, metrics or the loop. Every engine averages gradients over ranks and is told
that accumulation is 1: the step (`train.py`) owns the scaling, so nobody divides behind its back.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import ConfigError, EngineConfig, Problem

# A launcher's flag, or a default accelerate configuration in the user's home, must not win over our settings.
_FOREIGN_VARIABLES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
)


class Shard(NamedTuple):
    """A contiguous piece, owned by this rank, of one flattened tensor of the training state."""

    name: str
    """`model/<parameter>`, `exp_avg/<parameter>`, ..."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: int
    """Where the piece begins in the flattened tensor."""
    piece: Tensor
    """1-D view of live fp32 memory: reading it saves, writing into it restores."""


class Engine:
    """One process of a `ddp` run: every rank holds the whole model; gradients are averaged in the last backward pass of a step.

    At one process there is no wrapper at all. Attributes: rank, world_size, device, precision, model (bare module), optimizer.
    Raises ConfigError when the processes are not what the settings ask for.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.accelerator = _start_processes(config)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.precision = config.precision or ("bf16" if self.device.type == "cuda" else "fp32")
        self._assert_as_asked()

    def _assert_as_asked(self) -> None:
        """Accelerate drops or overrides settings silently under some environments; an unequal pair stops the run."""
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        kind = "NO" if ranks == 1 and not dist.is_initialized() else "MULTI_GPU" if self.device.type == "cuda" else "MULTI_CPU"
        pairs = {
            "processes": (self.config.world_size or ranks, self.world_size),
            "distributed type": (kind, self.accelerator.distributed_type.value),
            "accumulation inside the engine": (1, self.accelerator.gradient_accumulation_steps),
            "precision inside accelerate": ("no", self.accelerator.mixed_precision),
        }
        problems = [
            Problem("engine", f"{what}: asked for {asked}, got {got}; look for ACCELERATE_* variables and an accelerate config file")
            for what, (asked, got) in pairs.items()
            if asked != got
        ]
        if problems:
            raise ConfigError(problems)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        """Takes the model (on this rank's device, equal on all ranks) and its optimizer. `grad_clip` 0 is off."""
        self.model, self.optimizer, self.grad_clip = model, optimizer, grad_clip
        if self.config.compile:
            model.compile_parts()
        self._wrapped = model
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    # ---------------------------------------------------------------- the calls of a step

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around one forward and backward; gradients travel between ranks only in the `last` of a step."""
        quiet = self._wrapped.no_sync() if self.world_size > 1 and not last else contextlib.nullcontext()
        with quiet:
            yield

    def forward(self, *batch: Tensor | None) -> Tensor:
        """loss_sum of one micro-batch: (), fp32, nats summed over its valid labels."""
        with self.autocast():
            return self._wrapped(*batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to this rank's gradients."""
        loss.backward()

    def update(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clips, and moves the weights unless the gradient is not finite.

        Returns the norm of the full gradient before clipping () and whether the update was applied (), bool; both stay on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        applied = torch.isfinite(grad_norm)
        # Fused optimizers leave weights, moments and their step counter untouched where found_inf is 1, without asking the host.
        self.optimizer.found_inf = (~applied).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm, applied

    # ---------------------------------------------------------------- other services

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 compute under `precision: bf16`; weights, gradients and their reduction stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    def copy_to_host(self, values: Tensor) -> Callable[[], list]:
        """Starts a copy; the result waits for it alone, not for what the device was given to do since."""
        if self.device.type != "cuda":
            return values.tolist
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return lambda: (copied.synchronize(), host.tolist())[1]

    def to_device(self, batch: tuple) -> tuple:
        """The batch with its tensors on this rank's device; None stays None."""
        return type(batch)(*(None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in batch))

    @property
    def device_name(self) -> str:
        """Such as `NVIDIA H100 80GB HBM3`, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def broadcast(self, number: int) -> int:
        """Rank 0's whole number, on every rank."""
        value = torch.tensor(number, device=self.device)
        if dist.is_initialized():
            dist.broadcast(value, 0)
        return int(value)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.broadcast(0)

    def shards(self, *, saving: bool) -> Iterator[Shard]:
        """The training state as pieces: when saving, ranks share the work and the pieces of all ranks tile every tensor exactly
        once; when loading, each rank gets all that it holds."""
        for name, parameter in self.model.named_parameters():
            state = self._optimizer_state(parameter)
            count = parameter.numel()
            share = math.ceil(count / self.world_size)
            start, stop = (min(r * share, count) for r in (self.rank, self.rank + 1)) if saving else (0, count)
            for kind, tensor in {"model": parameter.detach(), **state}.items():
                yield Shard(f"{kind}/{name}", tuple(parameter.shape), start, tensor.view(-1)[start:stop])

    def _optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments of a parameter; made the way torch makes them where no step was taken yet."""
        state = self.optimizer.state[parameter]
        if "exp_avg" not in state:
            device = parameter.device if self.optimizer.defaults.get("fused") else "cpu"
            state["step"] = torch.zeros((), device=device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}

    @property
    def updates(self) -> int:
        """Updates applied so far, as the optimizer's bias correction counts them."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    def close(self) -> None:
        """Ends the process group; gloo aborts at exit when the DDP object still lives then."""
        self.model = self.optimizer = self._wrapped = None
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _start_processes(config: EngineConfig):
    """The Accelerator, made from our settings alone. Works under python, torchrun and accelerate launch."""
    for name in _FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = not torch.cuda.is_available()
    if cpu and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun sets one thread for every process; on CPUs that leaves most of the machine idle.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    group = InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=timedelta(seconds=config.timeout_seconds))
    alone = "LOCAL_RANK" not in os.environ  # plain python, or accelerate launch with one process: no process group
    return Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_steps=1, kwargs_handlers=[] if alone else [group])
