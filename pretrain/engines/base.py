"""The interface of engines, which distribute a model over processes, and what they share. `ddp.py`, `zero.py` and `fsdp2.py`
hold the engines; no code outside this package depends on which one runs.

An engine is built from the settings alone, never from a launcher's flags, and then asserts that what runs is what was
requested. It runs micro-batches and updates; it knows nothing of data, metrics or the training loop. Every engine averages
gradients over ranks and is configured with accumulation 1: the step (`train.py`) owns the scaling, so nothing else divides.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain import target
from pretrain.config import ConfigError, EngineConfig, Problem
from pretrain.engines import fp8, parallel
from pretrain.engines.compile import checkpoint_activations, choose, compile_model, compiler_problem
from pretrain.engines.forward_time import ForwardTimer
from pretrain.engines.mesh import Mesh
from pretrain.engines.place import FOREIGN, Place, read_place
from pretrain.engines.rendezvous import meet
from pretrain.engines.shards import Cut, Holders, LocalState, Shard, exchange_averages, row_states, start_averages
from pretrain.engines.watchdog import Watchdog, interval, record_collectives

_KEPT_VARIABLES = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL")


class Engine:
    """Base class of engines. Attributes: rank, world_size, mesh, device, precision, watchdog; after `prepare` also model (the
    bare module), cuts (of its parameters, by name), optimizer, compiled and compiled_why. A subclass defines `_distribute`,
    `micro_batch`, `local_states` and `replicated_weights`.
    """

    autocast_dtype: torch.dtype | None = None
    """Dtype of matrix products in the forward pass if the engine keeps weights in fp32; None: the dtype of the weights."""

    compile_backend: str | Callable = "inductor"
    """Backend of torch.compile; a dry run sets its own."""

    def __init__(self, config: EngineConfig, store: dist.Store | None = None):
        self.config = config
        self.precision = default_precision(config)
        if self.precision == "fp8":
            fp8.require_hardware()
        self.place = read_place()
        if store is None and not dist.is_initialized():
            store = meet(self.place, config.timeout_seconds)
        self.accelerator = _start_processes(config, self.place, store, **self._accelerator_options())
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.watchdog = Watchdog(self.rank, self.world_size, config.timeout_seconds)
        self.forward_timer: ForwardTimer | None = None
        self._around_forward: contextlib.AbstractContextManager = contextlib.nullcontext()
        self._attached: list[Tensor] = []
        self.mesh = Mesh(config, self.rank, self.world_size)
        self.mesh.connect(self.device.type, weights=config.name == "fsdp2")
        ranks = self.place.world_size
        require(
            processes=(config.world_size or ranks, self.world_size),
            accumulation_inside_the_engine=(1, self.accelerator.gradient_accumulation_steps),
            **self._expected_of_accelerate(ranks),
        )

    def _accelerator_options(self) -> dict[str, Any]:
        """Options of the Accelerator, in addition to those of all engines."""
        return {"mixed_precision": "no", "cpu": not torch.cuda.is_available()}

    def _expected_of_accelerate(self, ranks: int) -> dict[str, tuple]:
        """State of accelerate, by name: (requested, actual). Some environment variables silently override its settings."""
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
        """Builds and distributes the model and sets its initial weights: those of `seed`, the same under every engine, or those
        that `fill` writes into each shard of this rank.

        make_model: called on the meta device, so that no rank ever holds more than its engine keeps there. make_optimizer:
        takes the model. grad_clip: largest norm of the full gradient; 0 is off.
        """
        self.grad_clip = grad_clip
        self.model = self._make(make_model)
        self.cuts: dict[str, Cut] = parallel.cut_model(self.model, self.mesh) if self.mesh.cut else {}
        if self.precision == "fp8":
            fp8.convert(self.model, gather_fp8=self.config.name == "fsdp2", emulate=target.kind(self.device) == "cpu")
        recomputed, parameters = self.config.activation_checkpointing, sum(p.numel() for p in self.model.parameters())
        # Experts of several ranks break a block's graph, and a compiled checkpoint with a break inside would run uncompiled.
        around_graphs = recomputed == "full" and self.mesh.expert > 1
        if recomputed != "none" and not around_graphs:
            checkpoint_activations(self.model, recomputed)
        self._compile(parameters)
        if around_graphs:
            checkpoint_activations(self.model, recomputed)
        self._distribute(lambda model: make_optimizer(self._with_holders(model)))
        self._warm_up()
        if fill is None:
            self._draw(seed)
        else:
            self.restore(fill, moments=False)

    def _compile(self, parameters: int) -> None:
        """Compiles the model and sets `compiled` (none, blocks or model) and `compiled_why`, the same on all ranks.

        Raises ConfigError where engine.compile asks for a compiler that does not work; the default then compiles nothing.
        """
        self.compiled, self.compiled_why = choose(self.config, target.kind(self.device), self.world_size, parameters)
        if self.compiled == "none":
            return
        if self.compile_backend == "inductor" and (problem := self._compiler_problem()):
            text = f"the compiler fails ({problem})"
            if self.config.compile:
                advice = "install what it needs (a C++ compiler, Python's headers, on GPUs Triton) or use none"
                raise ConfigError([Problem("engine.compile", f"is {self.compiled}, but {text}; {advice}")])
            self.compiled, self.compiled_why = "none", f"slower than {self.compiled}, {self.compiled_why}, but {text}"
            return
        compile_model(self.model, self.compiled, self.compile_backend, sent=self.mesh.expert > 1)

    def _compiler_problem(self) -> str | None:
        """Why the compiler does not work, here or on another rank; None: it works on all ranks. A collective."""
        problem = compiler_problem(self.device)
        if self.world_size == 1:
            return problem
        failed = self.all_reduce(torch.tensor(int(problem is not None), device=self.device))
        return (problem or "on another rank") if int(failed) else None

    def _make(self, make_model: Callable[[], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            return make_model()

    def _with_holders(self, model: nn.Module) -> nn.Module:
        """Tells the optimizer who holds what, where the placement of a parameter does not."""
        for name, parameter in model.named_parameters():
            parameter.holders = self._holders(name)
        return model

    def _holders(self, name: str) -> Holders | None:
        """The ranks that hold a parameter; None: as its placement says."""
        return None

    def _distribute(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        """Allocates `self.model`; sets `self.optimizer` and `self._wrapped`, the module to call in a forward pass."""
        raise NotImplementedError

    def _draw(self, seed: int) -> None:
        """Sets the initial weights of `seed`: several parameters at once, on this rank's share of the host's cores. Each has a
        generator of its own, so that their order does not matter."""
        states = [state for state in self._held(saving=False) if "model" in state.tensors]
        states.sort(key=lambda state: state.offset + state.tensors["model"].numel(), reverse=True)  # the longest draws first

        def draw(shard: Shard) -> None:
            name = shard.name.removeprefix("model/")
            self.model.fill_initial(shard.values, shard.offset, name, shard.shape, seed)

        with ThreadPoolExecutor(_cores(self.place), "draw") as pool:
            for drawn in [pool.submit(state.fill, draw, moments=False) for state in states]:
                drawn.result()
                self.watchdog.alive("drawing its initial weights")
        start_averages(self.local_states(saving=False))
        self._refresh()

    def _warm_up(self) -> None:
        """Makes changes that the engine would otherwise make after its first step. The weights have no values yet."""

    # ---------------------------------------------------------------- the calls of a step

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """A context for one forward and backward pass. last: it is the last micro-batch of the step."""
        raise NotImplementedError

    def forward(self, *batch: Tensor | None) -> Any:
        """Returns the model's `LossOutput` for one micro-batch (tokens_BT, labels_BT, documents_BT), loss_sum in nats."""
        self.watchdog.mark("forward")
        with self.autocast(), self._around_forward:
            return self._wrapped(*batch)

    def time_forward(self) -> None:
        """Makes `forward_timer` measure forward passes from now on, if there are other ranks to compare them with."""
        gathers = self.config.name in ("fsdp2", "zero3")
        if self.world_size == 1 or self.forward_timer or (gathers and self.compiled == "model"):  # no code between its blocks
            return
        blocks = list(self.model.model.layers) if gathers else []
        self.forward_timer = ForwardTimer(self.device, len(blocks) or 1)
        if not gathers:
            self._around_forward = self.forward_timer
        for block in blocks:  # the hooks that gather its weights run around `forward`; what is recomputed does not come here
            block.forward = self.forward_timer.timed(block.forward)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to this rank's gradients."""
        self.watchdog.mark("backward")
        self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clips and applies the gradient, or skips the update if it is not finite. A group's `lr_scale` multiplies `lr`.

        Returns two tensors () that stay on the device: the norm of the full gradient before clipping; whether the update was
        applied, bool.
        """
        self.watchdog.mark("update")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return self._update()

    def _update(self) -> tuple[Tensor, Tensor]:
        self._sum_gradients()
        grad_norm = self._clip()
        applied = torch.isfinite(grad_norm)
        # Fused optimizers leave weights, moments and step counters untouched where found_inf is 1, without asking the host.
        self.optimizer.found_inf = (~applied).float()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return grad_norm, applied

    def _sum_gradients(self) -> None:
        """Sums what ranks that share tokens or experts hold apart, after the engine has averaged gradients."""

    def _is_expert(self, name: str) -> bool:
        """Whether each rank has another part of this parameter, whatever tokens it has, as with experts over several ranks."""
        return self.mesh.expert > 1 and ".experts." in name

    def _clip(self) -> Tensor:
        """Clips the gradient and returns the norm of the full gradient before clipping, ()."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)

    # ---------------------------------------------------------------- the step's collective, and what travels with it

    def count_labels(self, batch: Any) -> Tensor:
        """Valid labels (!= -100) of this rank's part of each sample, (B,), int64. Of ranks that share tokens, the first one
        counts them."""
        labels_B = (batch.labels_BT != -100).sum(1)
        return labels_B if self.mesh.tensor_rank == 0 else 0 * labels_B

    def count_tokens(self, window: list) -> Tensor:
        """Valid labels (!= -100) of the global batch, (), int64. One collective, which also sums what `attach` was given."""
        valid = sum(self.count_labels(batch).sum() for batch in window)
        attached, self._attached = self._attached, []
        sums = self.all_reduce(torch.cat([valid.double()[None], *attached]))  # float64: counts are exact to 2^53
        self.attached_sums = self.copy_to_host(sums[1:])
        return sums[0].long()

    def attach(self, numbers: list[float], value: Tensor) -> None:
        """Adds numbers of the host, and a value () of the device, to the next `count_tokens`: summed over ranks without a
        collective of their own. `attached_sums()` then returns them in this order; it waits for that copy alone."""
        self._attached = [self.upload(numbers, torch.float64), value.to(self.device, torch.float64)[None]]

    # ---------------------------------------------------------------- the training state

    def shards(self, *, saving: bool) -> Iterator[Shard]:
        """The training state of this rank. saving: only the shards that this rank must save; those of all ranks cover every
        tensor exactly once. To write into shards, use `restore`."""
        self._make_moments()
        for state in self._held(saving):
            for shard in state.saved():
                self.watchdog.alive("saving" if saving else "reading its state")
                yield shard

    def saved_values(self) -> int:
        """Number of values in `shards(saving=True)`: of this rank alone, without a collective."""
        self._make_moments()
        return sum(state.saved_values for state in self._held(saving=True))

    def restore(self, fill: Callable[[Shard], None], *, moments: bool = True) -> None:
        """Calls `fill` with every shard of this rank's state, with or without moments, then updates what depends on them."""
        if moments:
            self._make_moments()
        with torch.no_grad():
            for state in self._held(saving=False):
                self.watchdog.alive("loading")
                state.fill(fill, moments)
        if not moments:
            start_averages(self.local_states(saving=False))
        self._refresh()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[bool]:
        """In this context the model has the average of its weights, if the optimizer keeps one (True). A collective."""
        averaged = exchange_averages(self.local_states(saving=False))
        if averaged:
            self._refresh()
        try:
            yield averaged
        finally:
            if averaged:
                exchange_averages(self.local_states(saving=False))
                self._refresh()

    def _held(self, saving: bool) -> Iterator[LocalState]:
        """This rank's part of weights, of moments if they exist, and of buffers."""
        yield from self.local_states(saving)
        if getattr(self.optimizer, "row_beta", 0):
            yield from row_states(self.optimizer, self.model, self.local_states(saving=False), self._saves_rows, saving)
        for name, buffer in self.model.named_buffers():  # fp32 and equal on all ranks, so rank 0 saves them
            values = buffer.view(-1)[: 0 if saving and self.rank > 0 else None]
            yield LocalState(name, tuple(buffer.shape), 0, {"model": values})

    def local_states(self, saving: bool) -> Iterator[LocalState]:
        """This rank's part of each parameter. saving: only the parts that this rank must save. Moments are included once they
        exist."""
        raise NotImplementedError

    def _saves_rows(self, name: str) -> bool:
        """Whether no other rank works on the matrices on which this rank works."""
        return True

    def replicated_weights(self) -> Iterator[tuple[list[Tensor], dist.ProcessGroup | None]]:
        """Weights that should be equal on all ranks of a group, in one order everywhere, and the group; None: all ranks."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Brings the weights of the forward pass in line with master weights that were written."""

    def _make_moments(self) -> None:
        if not self.optimizer.state:
            make_moments(self.optimizer, [group["params"] for group in self.optimizer.param_groups])

    @property
    def updates(self) -> int:
        """Number of updates applied so far, as the optimizer's bias correction counts them."""
        self._make_moments()
        return int(next(iter(self.optimizer.state.values()))["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        self._make_moments()
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    # ---------------------------------------------------------------- other services

    def autocast(self) -> contextlib.AbstractContextManager:
        """A context for forward passes: bf16 products if the engine keeps weights in fp32."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        self.watchdog.mark("all_reduce")
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def copy_to_host(self, values: Tensor) -> Callable[[], list]:
        """Starts a copy. The function returned waits for it, but not for work queued on the device since, and returns it."""
        if self.device.type != "cuda":
            return values.tolist
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return lambda: (copied.synchronize(), host.tolist())[1]

    def upload(self, numbers: list, dtype: torch.dtype | None = None) -> Tensor:
        """A list of numbers as a tensor on the device. The host does not wait: the copy reads pinned memory."""
        host = torch.tensor(numbers, dtype=dtype, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def pin(self, batch: tuple) -> tuple:
        """The tensors of a batch in memory from which `to_device` copies without waiting: pinned if there is a GPU."""
        if self.device.type != "cuda":
            return batch
        return type(batch)(*(None if tensor is None else tensor.pin_memory() for tensor in batch))

    def part_of(self, batch: tuple) -> tuple:
        """This rank's tokens and labels of a batch (tokens_BT, labels_BT, documents_BT) whose sequences ranks share. Documents
        stay complete: attention sees all tokens."""
        if self.mesh.sequence == 1:
            return batch
        tokens_Bt, labels_Bt = (tensor.chunk(self.mesh.sequence, 1)[self.mesh.sequence_rank] for tensor in batch[:2])
        return type(batch)(tokens_Bt, labels_Bt, *batch[2:])

    def to_device(self, batch: tuple) -> tuple:
        """Copies the tensors of a batch to this rank's device; None stays None."""
        return type(batch)(*(None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in batch))

    @property
    def device_name(self) -> str:
        """For example `NVIDIA H100 80GB HBM3`, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def broadcast(self, number: int) -> int:
        """Returns rank 0's integer on every rank."""
        self.watchdog.mark("broadcast")
        value = torch.tensor(number, device=self.device)
        if self.world_size > 1:
            dist.broadcast(value, 0)
        return int(value)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.broadcast(0)

    def close(self) -> None:
        """Destroys the process group; gloo aborts at exit if an object still uses it then."""
        self.watchdog.stop()
        self.model = self.optimizer = self._wrapped = None
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


# ---------------------------------------------------------------- helpers of engines


def require(**pairs: tuple) -> None:
    """Takes setting=(requested, actual). Raises ConfigError with every pair that is not equal."""
    problems = [
        Problem(
            "engine",
            f"{setting.replace('_', ' ')}: requested {requested}, got {actual}; check ACCELERATE_* variables and accelerate's "
            "configuration file. If neither explains it, the library ignored this setting: please report it",
        )
        for setting, (requested, actual) in pairs.items()
        if requested != actual
    ]
    if problems:
        raise ConfigError(problems)


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's tensors that have one element per element of the parameter; empty before they are made."""
    state = optimizer.state.get(parameter, {})
    return {kind: tensor for kind, tensor in state.items() if isinstance(tensor, Tensor) and tensor.shape == parameter.shape}


def make_moments(optimizer: torch.optim.Optimizer, parameters_of_groups: list[list[Tensor]]) -> None:
    """Makes the optimizer create its state, by a step on zero gradients that found_inf turns into a no-op."""
    parameters = [parameter for group in parameters_of_groups for parameter in group]
    kept = [group["params"] for group in optimizer.param_groups], [parameter.grad for parameter in parameters]
    for group, params in zip(optimizer.param_groups, parameters_of_groups, strict=True):
        group["params"] = params
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)
    optimizer.step()
    del optimizer.found_inf
    for group, params in zip(optimizer.param_groups, kept[0], strict=True):
        group["params"] = params
    for parameter, gradient in zip(parameters, kept[1], strict=True):
        parameter.grad = gradient


def _prefer_expandable_segments() -> None:
    """Lets PyTorch's allocator grow segments of GPU memory, which leaves fewer gaps between tensors, unless the environment
    configures it. PyTorch reads the variable at its first allocation."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _keep_freed_memory() -> None:
    """Lets glibc reuse the memory of freed tensors of up to 32 MiB, the largest threshold that all its versions accept, unless
    the environment configures it. Otherwise much of it returns to the system, and is mapped and zeroed again in each step.
    Other C libraries have no `mallopt`."""
    library, (m_trim_threshold, m_mmap_threshold) = ctypes.CDLL(None), (-1, -3)  # names and numbers of malloc.h
    chosen = {"GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if hasattr(library, "mallopt") and not chosen:
        library.mallopt(m_mmap_threshold, 32 * 2**20)
        library.mallopt(m_trim_threshold, 2**31 - 1)


def _cores(place: Place) -> int:
    """This rank's share of the cores that its host gives to its ranks, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (place.local_world_size or 1))


def require_device(place: Place) -> None:
    """Raises ConfigError if this rank has no GPU on a machine that has some."""
    if torch.cuda.is_available() and place.local_rank >= (count := torch.cuda.device_count()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={visible} shows {count}" if visible else f"there are {count}"
        text = f"rank {place.rank} needs GPU {place.local_rank} on {socket.gethostname()}, but {why}; start fewer processes"
        raise ConfigError([Problem("LOCAL_RANK", text)])


def default_precision(config: EngineConfig) -> str:
    """`engine.precision`, or what it is on this machine."""
    return config.precision or ("bf16" if torch.cuda.is_available() else "fp32")


def _start_processes(config: EngineConfig, place: Place, store: dist.Store | None, **options: Any):
    """Makes the Accelerator from the settings alone, under python, torchrun or accelerate launch.

    store: of `meet`; None: this process has a process group already, of an earlier engine.
    """
    # A launcher's flag, or a default accelerate configuration in the user's home, must not override the settings.
    foreign = ("ACCELERATE_", "FSDP_", *FOREIGN)
    for name in [name for name in os.environ if name.startswith(foreign) and name not in _KEPT_VARIABLES]:
        del os.environ[name]
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    cpu = not torch.cuda.is_available()
    if cpu:
        _keep_freed_memory()
    else:
        _prefer_expandable_segments()
    if cpu and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun gives every process one thread, which leaves most of a CPU-only machine idle.
        torch.set_num_threads(_cores(place))
    record_collectives()
    patience = timedelta(seconds=config.timeout_seconds + 10 * interval(config.timeout_seconds))  # the watchdog reports first
    group = InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=patience)
    if store is not None and (place.launched or config.name != "ddp"):  # ddp needs no process group for a process alone
        backend = group.backend if place.launched or cpu else "cuda:nccl,cpu:gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=patience)
    return Accelerator(gradient_accumulation_steps=1, kwargs_handlers=[group] if place.launched else [], **options)
