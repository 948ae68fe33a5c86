"""The engines `zero1`, `zero2`, `zero3` (DeepSpeed), started through Accelerate with a plugin made from the settings.

DeepSpeed flattens the parameters of each optimizer group and gives every rank one contiguous part of the result, so a rank's
part of a parameter is contiguous, too. The attributes read here (`bit16_groups`, `fp16_groups`, `_hp_mapping`, ...) are
internals of DeepSpeed and may change: constraints.txt pins the version, tests/distributed/test_engines.py covers each stage.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import ConfigError, EngineConfig, Problem
from pretrain.engines.base import Engine, make_moments, moments_of, require
from pretrain.engines.shards import LocalState


class ZeroEngine(Engine):
    """One process of a `zero1`, `zero2` or `zero3` run."""

    def __init__(self, config: EngineConfig, store: dist.Store | None = None):
        self.stage = int(config.name.removeprefix("zero"))
        super().__init__(config, store)
        self._alone = not self.place.launched
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, even for one process

    def _accelerator_options(self) -> dict[str, Any]:
        if not importlib.util.find_spec("transformers"):
            raise ConfigError(
                [Problem("engine.name", f"{self.config.name} needs the package transformers: pip install transformers")]
            )
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
            import deepspeed.ops

            # Otherwise DeepSpeed compiles a C++ extension at its first start: half a minute, or forever behind a stale lock.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _import_muon()
        from accelerate.utils import DeepSpeedPlugin

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        plugin = DeepSpeedPlugin(hf_ds_config=self._settings(), zero3_init_flag=False)
        return {"deepspeed_plugin": plugin, "mixed_precision": "bf16" if self.precision == "bf16" else "no"}

    def _settings(self) -> dict[str, Any]:
        """The complete configuration of DeepSpeed."""
        config, bf16 = self.config, self.precision == "bf16"
        bucket = (config.bucket_mib or 200) * 2**20 // 4  # DeepSpeed counts elements
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
            "memory_efficient_linear": False,  # it would replace F.linear and round differently from other engines
        }
        if self.stage == 3:
            zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": config.keep_whole_below}
        if config.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if config.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,  # used only for its counters
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # set in `_distribute`
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW runs on the host, too, and needs no compiler
            "bf16": {"enabled": bf16, "check_grad_overflow": True},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }

    def _expected_of_accelerate(self, ranks: int) -> dict[str, tuple]:
        precision = "bf16" if self.precision == "bf16" else "no"
        return {
            "distributed_type": ("DEEPSPEED", self.accelerator.distributed_type.value),
            "precision_inside_accelerate": (precision, self.accelerator.mixed_precision),
        }

    # ---------------------------------------------------------------- building

    def _make(self, make_model: Callable[[], nn.Module]) -> nn.Module:
        if self.stage == 3:
            import deepspeed

            # Init shards each module as soon as it is made. It ignores its argument `dtype` and reads the settings.
            with deepspeed.zero.Init(config_dict_or_path=self.accelerator.deepspeed_plugin.deepspeed_config):
                return make_model()
        return super()._make(make_model).to(self._compute_dtype).to_empty(device=self.device)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def _distribute(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = self.grad_clip
        if self.stage == 3:
            from deepspeed.utils import set_z3_leaf_modules

            # Hooks around a block gather it at once: fewer messages, and no hooks inside it that would hinder compilation or
            # recomputation.
            set_z3_leaf_modules(self.model, [type(block) for block in self.model.model.layers])
        with _full_shapes(self.model):
            optimizer = make_optimizer(self.model)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use
            self._wrapped, _ = self.accelerator.prepare(self.model, optimizer)
        for buffer in self.model.buffers():  # DeepSpeed casts them to bf16, or leaves them on another device
            buffer.data = buffer.data.to(self.device, torch.float32)
        self._unreduced: contextlib.AbstractContextManager | None = None
        self._zero = self._wrapped.optimizer  # ZeRO's optimizer, which wraps ours
        self.optimizer = self._zero.optimizer
        require(
            stage=(self.stage, int(self._wrapped.zero_optimization_stage())),
            weights=({self._compute_dtype}, {parameter.dtype for parameter in self.model.parameters()}),
            master_weights=({torch.float32}, {flat.dtype for _, flat in self._groups()}),
            accumulation=(1, self._wrapped.gradient_accumulation_steps()),
            clipping=(self.grad_clip, self._wrapped.gradient_clipping()),
            ranks=(self.world_size, self._wrapped.dp_world_size),
            gradient_sum=(torch.float32, self._wrapped.get_data_types()[1]),
            reduction=(torch.float32, self._wrapped.communication_data_type),
        )

    # ---------------------------------------------------------------- the calls of a step

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self.stage > 1 and self.config.reduce_gradients == "step" and self._unreduced is None:
            self._unreduced = self._wrapped.coalesce_grad_reduction()  # stays open for all micro-batches of a step
            self._unreduced.__enter__()
        self._wrapped.set_gradient_accumulation_boundary(last)
        yield
        if last and self._unreduced is not None:
            self._unreduced.__exit__(None, None, None)
            self._unreduced = None
            self._wrapped.set_gradient_accumulation_boundary(True)  # leaving the context restored an older value

    def _backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss)

    def _update(self) -> tuple[Tensor, Tensor]:
        self._wrapped.step()  # clips; skips by itself if the gradient is not finite
        applied = self._wrapped.was_step_applied()
        # After a skipped step DeepSpeed still returns the norm of an earlier one.
        grad_norm = float(self._wrapped.get_global_grad_norm()) if applied else math.nan
        return torch.tensor(grad_norm, device=self.device), torch.tensor(applied, device=self.device)

    # ---------------------------------------------------------------- the training state

    def local_states(self, saving: bool) -> Iterator[LocalState]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameters, flat in self._groups():
            tensors = {"model": flat.detach(), **moments_of(self.optimizer, flat)}
            start = 0
            for parameter in parameters:
                shape, offset, begin, count = self._place(parameter, start)
                start += getattr(parameter, "ds_tensor", parameter).numel()
                yield LocalState(
                    names[parameter], shape, offset, {kind: t[begin : begin + count] for kind, t in tensors.items()}
                )

    def replicated_weights(self) -> Iterator[tuple[list[Tensor], None]]:
        yield [p.data for p in self.model.parameters() if self.stage < 3 or p.ds_persist], None

    def _groups(self) -> list[tuple[list[Tensor], Tensor]]:
        """(parameters, this rank's part of them, flat, fp32) for each flat tensor that the optimizer updates."""
        zero = self._zero
        if self.stage == 3:
            return list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))
        if hasattr(zero, "bit16_groups"):
            return list(zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True))
        return list(zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True))

    def _place(self, parameter: Tensor, start: int) -> tuple[tuple[int, ...], int, int, int]:
        """This rank's part of a parameter: (full shape, offset in the full parameter, begin in the flat tensor, count)."""
        if self.stage == 3:  # every parameter is split into equal parts, the last one padded
            part, full = parameter.ds_tensor.ds_numel, parameter.ds_numel
            offset = min(self.rank * part, full)
            return tuple(parameter.ds_shape), offset, start, min(part, full - offset)
        place = parameter._hp_mapping  # the group is split, so a part may begin or end inside a parameter, or miss it
        if place is None:
            return tuple(parameter.shape), 0, 0, 0
        return (
            tuple(parameter.shape),
            place.lp_fragment_address.start,
            place.hp_fragment_address.start,
            place.hp_fragment_address.numel,
        )

    def _refresh(self) -> None:
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()  # shards the parameters that are kept in full
        for number in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        self._zero.checkpoint_event_epilogue()  # and gathers them again from the new values

    def _make_moments(self) -> None:
        if self.optimizer.state:
            return
        if self.stage < 3:
            flats = [[flat] for _, flat in self._groups()]
        else:
            flats = [[] for _ in self.optimizer.param_groups]
            for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                flats[self._zero.sub_group_to_group_id[number]].append(flat)
        make_moments(self.optimizer, flats)

    def close(self) -> None:
        if hasattr(self, "_zero"):
            self._wrapped.destroy()
            del self._zero
            self.accelerator.free_memory()
        if self._alone:
            del os.environ["LOCAL_RANK"]
        super().close()


@contextlib.contextmanager
def _full_shapes(model: nn.Module) -> Iterator[None]:
    """Parameters that ZeRO-3 has sharded are empty tensors. In this context they have their full shapes, each in the memory of
    one element, so that an optimizer can tell matrices from vectors."""
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_shape")]
    empty = [parameter.data for parameter in sharded]
    for parameter in sharded:
        parameter.data = torch.empty(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in zip(sharded, empty, strict=True):
            parameter.data = data


def _import_muon() -> None:
    """Imports DeepSpeed's Muon, as DeepSpeed will, but without compiling it: `torch.compile` would load the compiler, which
    takes longer than the rest of a start, for an optimizer that no run uses."""
    from deepspeed.runtime import compiler

    genuine = getattr(compiler, "compile", None)
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ModuleNotFoundError):  # earlier versions of DeepSpeed have no Muon
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        if genuine is None:
            del compiler.compile
        else:
            compiler.compile = genuine
