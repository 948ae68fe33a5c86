"""How a model is spread over processes: the seam that every engine fits, and the engine `ddp`. `zero.py` and `fsdp2.py` hold
the others; nothing above this room knows which one runs.

An engine is built from *our* settings, never from a launcher's flags, and then asserts that what runs is what was asked. It
runs micro-batches and updates; it knows nothing of data, metrics or the loop. Every engine averages gradients over ranks and is
told that accumulation is 1: the step (`train.py`) owns the scaling, so nobody divides behind its back.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import ConfigError, EngineConfig, Problem
from pretrain.engines.compile import checkpoint_activations, compile_model
from pretrain.engines.watchdog import Watchdog, interval

_KEPT_VARIABLES = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL")


class Shard(NamedTuple):
    """A contiguous piece, held by this rank, of one flattened tensor of the training state."""

    name: str
    """`model/<parameter>`, `exp_avg/<parameter>`, ..."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: int
    """Where the piece begins in the flattened tensor."""
    values: Tensor
    """1-D view of live fp32 memory: reading it saves; `Engine.restore` writes into it."""


class LocalState(NamedTuple):
    """What this rank holds of one parameter: the same piece of its master weight and of each of its moments."""

    name: str
    shape: tuple[int, ...]
    offset: int
    tensors: dict[str, Tensor]
    """1-D views of live fp32 memory: `model` is the weight, the others are named as the optimizer names its state."""


class Engine:
    """Base class of all engines. Attributes: rank, world_size, device, precision, watchdog; after `prepare` also model (the
    bare module) and optimizer. A subclass defines `_distribute`, `micro_batch`, `local_states` and `replicated_weights`.
    """

    autocast_dtype: torch.dtype | None = None
    """Of products in the forward pass, where the engine leaves weights in fp32; None: the weights' own."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.precision = config.precision or ("bf16" if torch.cuda.is_available() else "fp32")
        self.accelerator = _start_processes(config, **self._accelerator_options())
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.watchdog = Watchdog(self.rank, self.world_size, config.timeout_seconds)
        self._attached: list[Tensor] = []
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        require(
            processes=(config.world_size or ranks, self.world_size),
            accumulation_inside_the_engine=(1, self.accelerator.gradient_accumulation_steps),
            **self._expected_of_accelerate(ranks),
        )

    def _accelerator_options(self) -> dict[str, Any]:
        """Of the Accelerator, beside those that all engines give."""
        return {"mixed_precision": "no", "cpu": not torch.cuda.is_available()}

    def _expected_of_accelerate(self, ranks: int) -> dict[str, tuple]:
        """What of accelerate's state: (asked, got). It drops or overrides settings silently under some environments."""
        many, got = "MULTI_GPU" if self.device.type == "cuda" else "MULTI_CPU", self.accelerator.distributed_type.value
        alone = ranks == 1 and got in ("NO", many)  # torchrun with one process makes a process group of one
        return {
            "distributed_type": (got if alone else "NO" if ranks == 1 else many, got),
            "precision_inside_accelerate": ("no", self.accelerator.mixed_precision),
        }

    # ---------------------------------------------------------------- building

    def prepare(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        grad_clip: float,
        seed: int,
        fill: Callable[[Shard], None] | None = None,
    ) -> None:
        """Builds the model, spreads it, and gives it the initial weights of `seed`: the same under every engine; or those with
        which `fill` fills each piece that this rank holds.

        make_model: the model without values; it is called on the meta device, so that no rank ever holds more than its engine
        keeps there. make_optimizer: over the model's parameters. grad_clip: largest norm of the full gradient; 0 is off.
        """
        self.grad_clip = grad_clip
        self.model = self._make(make_model)
        if self.config.activation_checkpointing != "none":
            checkpoint_activations(self.model, self.config.activation_checkpointing)
        if self.config.compile != "none":
            compile_model(self.model, self.config.compile)
        self._distribute(make_optimizer)
        self._warm_up()
        self.restore(fill or (lambda shard: _draw(self.model, shard, seed)), moments=False)

    def _make(self, make_model: Callable[[], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            return make_model()

    def _distribute(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        """Gives `self.model` memory and sets `self._wrapped`, what is called in a forward pass, and `self.optimizer`."""
        raise NotImplementedError

    def _warm_up(self) -> None:
        """What an engine would else change after its first step. The weights are not there yet."""

    # ---------------------------------------------------------------- the calls of a step

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Around one forward and backward; `last` of a step."""
        raise NotImplementedError

    def forward(self, *batch: Tensor | None) -> Tensor:
        """loss_sum of one micro-batch: (), fp32, nats summed over its valid labels."""
        self.watchdog.mark("forward")
        with self.autocast():
            return self._wrapped(*batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to this rank's gradients."""
        self.watchdog.mark("backward")
        self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clips, and moves the weights unless the gradient is not finite. A group's `lr_scale`, if it has one, multiplies `lr`.

        Returns two tensors () that stay on the device: the norm of the full gradient before clipping, and whether the update
        was applied, bool.
        """
        self.watchdog.mark("update")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return self._update()

    def _update(self) -> tuple[Tensor, Tensor]:
        grad_norm = self._clip()
        applied = torch.isfinite(grad_norm)
        # Fused optimizers leave weights, moments and step counters untouched where found_inf is 1, without asking the host.
        self.optimizer.found_inf = (~applied).float()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return grad_norm, applied

    def _clip(self) -> Tensor:
        """-> norm of the full gradient before clipping, ()."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)

    # ---------------------------------------------------------------- the step's collective, and what travels with it

    def count_tokens(self, window: list) -> Tensor:
        """Valid labels (!= -100) of the global batch, (), int64. One collective, which also sums what `attach` was given."""
        valid = sum((batch.labels_BT != -100).sum() for batch in window)
        attached, self._attached = self._attached, []
        sums = self.all_reduce(torch.cat([valid.double()[None], *attached]))  # float64: counts are exact to 2^53
        self.attached_sums = self.copy_to_host(sums[1:])
        return sums[0].long()

    def attach(self, numbers: list[float], value: Tensor) -> None:
        """Adds numbers of the host, and a value () of the device, to the next `count_tokens`: summed over ranks without a
        collective of their own. `attached_sums()` then returns them in this order; it waits for that copy alone."""
        options = {"dtype": torch.float64, "device": self.device}
        self._attached = [torch.tensor(numbers, **options), value.to(**options)[None]]

    # ---------------------------------------------------------------- the training state

    def shards(self, *, saving: bool) -> Iterator[Shard]:
        """The training state as pieces: when saving, ranks share the work and the pieces of all ranks tile every tensor exactly
        once; else each rank gets all that it holds. To write into them, use `restore`."""
        self._make_moments()
        for name, shape, offset, tensors in itertools.chain(self.local_states(saving), self._buffers(saving)):
            self.watchdog.alive("saving" if saving else "reading its state")
            for kind, piece in tensors.items():
                yield Shard(f"{kind}/{name}", shape, offset, piece)

    def restore(self, fill: Callable[[Shard], None], *, moments: bool = True) -> None:
        """Calls `fill` on every piece of the state that this rank holds, moments or not, then makes it take effect."""
        if moments:
            self._make_moments()
        with torch.no_grad():
            for name, shape, offset, tensors in itertools.chain(self.local_states(saving=False), self._buffers(saving=False)):
                self.watchdog.alive("loading")
                for kind, piece in tensors.items():
                    if moments or kind == "model":
                        fill(Shard(f"{kind}/{name}", shape, offset, piece))
        self._refresh()

    def local_states(self, saving: bool) -> Iterator[LocalState]:
        """What this rank holds of each parameter; when saving, what it writes. Moments are there once they are made."""
        raise NotImplementedError

    def _buffers(self, saving: bool) -> Iterator[LocalState]:
        """A model's buffers are fp32 and equal on all ranks, of which the first writes them."""
        for name, buffer in self.model.named_buffers():
            piece = buffer.view(-1)[: 0 if saving and self.rank > 0 else None]
            yield LocalState(name, tuple(buffer.shape), 0, {"model": piece})

    def replicated_weights(self) -> tuple[list[Tensor], dist.ProcessGroup | None]:
        """The weights that every rank of a group holds a copy of, in one order, and the group; None: all ranks."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """After master weights were written: brings what the forward pass uses in line."""

    def _make_moments(self) -> None:
        if not self.optimizer.state:
            make_moments(self.optimizer, [group["params"] for group in self.optimizer.param_groups])

    @property
    def updates(self) -> int:
        """Updates applied so far, as the optimizer's bias correction counts them."""
        self._make_moments()
        return int(next(iter(self.optimizer.state.values()))["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        self._make_moments()
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    # ---------------------------------------------------------------- other services

    def autocast(self) -> contextlib.AbstractContextManager:
        """Around forward passes: bf16 products where the engine leaves weights in fp32."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        self.watchdog.mark("all_reduce")
        if self.world_size > 1:
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
        self.watchdog.mark("broadcast")
        value = torch.tensor(number, device=self.device)
        if self.world_size > 1:
            dist.broadcast(value, 0)
        return int(value)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.broadcast(0)

    def close(self) -> None:
        """Ends the process group; gloo aborts at exit when an object that uses it still lives then."""
        self.watchdog.stop()
        self.model = self.optimizer = self._wrapped = None
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


# ---------------------------------------------------------------- what engines use


def require(**pairs: tuple) -> None:
    """what=(asked, got): raises ConfigError with every pair that is not equal."""
    problems = [
        Problem("engine", f"{what.replace('_', ' ')}: asked for {asked}, got {got}; look for ACCELERATE_* variables and an "
                "accelerate configuration file, or report it: this program asked and the library did otherwise")
        for what, (asked, got) in pairs.items()
        if asked != got
    ]  # fmt: skip
    if problems:
        raise ConfigError(problems)


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors that the optimizer keeps for each element of a parameter; none before it made them."""
    state = optimizer.state.get(parameter, {})
    return {kind: tensor for kind, tensor in state.items() if isinstance(tensor, Tensor) and tensor.shape == parameter.shape}


def make_moments(optimizer: torch.optim.Optimizer, parameters_of_groups: list[list[Tensor]]) -> None:
    """Lets the optimizer make its state as it does in a first step: one on zero gradients that found_inf turns into nothing."""
    parameters = [parameter for group in parameters_of_groups for parameter in group]
    kept = [group["params"] for group in optimizer.param_groups], [parameter.grad for parameter in parameters]
    for group, given in zip(optimizer.param_groups, parameters_of_groups, strict=True):
        group["params"] = given
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)
    optimizer.step()
    del optimizer.found_inf
    for group, params in zip(optimizer.param_groups, kept[0], strict=True):
        group["params"] = params
    for parameter, gradient in zip(parameters, kept[1], strict=True):
        parameter.grad = gradient


def _draw(model: nn.Module, shard: Shard, seed: int) -> None:
    """Fills a piece of a weight with its part of the whole parameter's initial value."""
    whole = model.initial_weight(shard.name.removeprefix("model/"), shard.shape, seed).view(-1)
    shard.values.copy_(whole[shard.offset : shard.offset + shard.values.numel()])


def _start_processes(config: EngineConfig, **options: Any):
    """The Accelerator, made from our settings alone. Works under python, torchrun and accelerate launch."""
    # A launcher's flag, or a default accelerate configuration in the user's home, must not win over our settings.
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")) and name not in _KEPT_VARIABLES]:
        del os.environ[name]
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = not torch.cuda.is_available()
    if cpu and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun sets one thread for every process; on CPUs that leaves most of the machine idle.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    patience = timedelta(seconds=config.timeout_seconds + 10 * interval(config.timeout_seconds))  # the watchdog speaks first
    group = InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=patience)
    alone = "LOCAL_RANK" not in os.environ  # plain python, or accelerate launch with one process
    if alone and config.name != "ddp":  # these engines want a process group also for one process
        backend = "gloo" if cpu else "cuda:nccl,cpu:gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Accelerator(gradient_accumulation_steps=1, kwargs_handlers=[] if alone else [group], **options)
