"""The programs that peers.py compares. It starts each of them in processes of their own; nobody else calls this file.

    python benchmarks/peer_programs.py NAME TASK.json

Every program is the framework's own training loop, driven as its documentation says:

    ours          launch/pretrain.py, from its command line
    transformers  `Trainer.train` of Hugging Face on a `LlamaForCausalLM` and a dataset of prepared tensors
    litgpt        `litgpt.pretrain.setup` on a data module of prepared tensors, fused AdamW on GPUs only, as it is shipped
    nanogpt       train.py of a checkout, from its command line

They have one thing in common: `Gate`, a hook that torch calls after every step of any optimizer. It holds the program until the
benchmark lets it make more steps, so the programs can take turns, and reads the clocks of the process. Imports nothing of this
project, since a peer's environment lacks its dependencies.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

NAME, TASK = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
RANK, CUDA = int(os.environ.get("RANK", 0)), torch.cuda.is_available()
MODEL, LENGTH, STEPS = TASK["model"], TASK["sequence_length"], TASK["steps"]
LR, BETAS, EPS, WEIGHT_DECAY = TASK["lr"], TASK["betas"], TASK["eps"], TASK["weight_decay"]
FOLDER = Path(TASK["folder"]) / NAME


class Gate:
    """Stops the program after a step of the optimizer until the benchmark asks for more."""

    def __init__(self) -> None:
        self.asked, self.answers = (
            os.fdopen(int(fd), mode) for fd, mode in zip(os.environ["GATE"].split(","), "rw", strict=True)
        )
        self.left, self.parameters, self.cpu, self.began = 1, 0, 0.0, time.perf_counter()
        register_optimizer_step_post_hook(self.after_step)

    def after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Counts one step; after the last that was asked for, reports and waits for the next request."""
        self.left -= 1
        if self.left:
            return
        if not self.parameters:
            self.parameters = sum(each.numel() for group in optimizer.param_groups for each in group["params"])
        self.report()
        self.left = int(self.asked.readline())
        self.began = time.perf_counter()

    def report(self, **more: object) -> None:
        """Sends wall seconds since the request, CPU seconds of all threads since the report before, and the peak of memory."""
        if CUDA:
            torch.cuda.synchronize()
        cpu, before = time.process_time(), self.cpu
        self.cpu = cpu
        status = Path("/proc/self/status").read_text()
        peak = torch.cuda.max_memory_allocated() if CUDA else 1024 * int(status.split("VmHWM:")[1].split()[0])
        seconds = {"wall": time.perf_counter() - self.began, "cpu": cpu - before}
        print(json.dumps({**seconds, "peak_bytes": peak, "parameters": self.parameters, **more}), file=self.answers, flush=True)


def read_samples() -> torch.Tensor:
    """(samples, T + 1) int64: the tokens of every step, in the order of ours."""
    return torch.load(TASK["samples"], weights_only=True, mmap=True)


def ours() -> list[float]:
    """Losses of launch/pretrain.py: of step 1, then of each later line of metrics.jsonl, times the steps that it covers."""
    sys.argv = [TASK["script"], *TASK["settings"]]
    with contextlib.suppress(SystemExit):
        runpy.run_path(TASK["script"], run_name="__main__")
    lines = [json.loads(line) for line in (FOLDER / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    steps = [0, *(line["step"] for line in lines)]
    return [line["loss"] for i, line in enumerate(lines) for _ in range(steps[i + 1] - steps[i])]


def transformers() -> list[float]:
    """Losses of Trainer: of step 1, then the mean of the others for each of them."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    rope = {"rope_type": "default", "rope_theta": MODEL["rope_theta"]}
    shape = {key: value for key, value in MODEL.items() if key != "rope_theta"}
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, use_cache=False))
    model.load_state_dict(torch.load(TASK["weights"], weights_only=True))
    samples, logged = read_samples(), []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.extend([logs["loss"]] if "loss" in logs else [])

    arguments = TrainingArguments(
        output_dir=str(FOLDER), max_steps=STEPS, per_device_train_batch_size=TASK["micro_batch_size"],
        gradient_accumulation_steps=TASK["accumulation"], learning_rate=LR, lr_scheduler_type="constant",
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, weight_decay=WEIGHT_DECAY, max_grad_norm=1.0,
        bf16=CUDA, torch_compile=TASK["compile"], save_strategy="no", report_to="none", disable_tqdm=True,
        logging_first_step=True, logging_steps=STEPS, remove_unused_columns=False, train_sampling_strategy="sequential",
        use_cpu=not CUDA, ddp_backend="gloo" if "RANK" in os.environ and not CUDA else None,
    )  # fmt: skip
    # The labels are shifted already, so that it trains on the same T labels as the others, not on T - 1.
    data = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in samples]
    Trainer(model, arguments, train_dataset=data, callbacks=[Losses()]).train()
    return [logged[0], *[logged[1]] * (STEPS - 1)]


def litgpt() -> list[float]:
    """Losses of litgpt: of each step, from the CSV file that it logs."""
    from litgpt import Config, pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from torch.utils.data import DataLoader

    class Prepared(DataModule):
        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
            self.batch_size = batch_size

        def train_dataloader(self):
            return DataLoader(read_samples(), batch_size=self.batch_size, pin_memory=True)

        def val_dataloader(self):
            return DataLoader(read_samples()[: self.batch_size], batch_size=self.batch_size)

    config = Config(
        block_size=LENGTH, vocab_size=MODEL["vocab_size"], padded_vocab_size=MODEL["vocab_size"],
        n_layer=MODEL["num_hidden_layers"], n_head=MODEL["num_attention_heads"], n_embd=MODEL["hidden_size"],
        n_query_groups=MODEL["num_key_value_heads"], head_size=MODEL["head_dim"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=MODEL["rms_norm_eps"],
        mlp_class_name="LLaMAMLP", intermediate_size=MODEL["intermediate_size"], rope_base=MODEL["rope_theta"],
    )  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, torch.load(TASK["weights"], weights_only=True))
    torch.save(weights, FOLDER / "lit_model.pth")
    rule = {"lr": LR, "betas": tuple(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    rows = TASK["micro_batch_size"] * TASK["accumulation"]
    pretrain.save_checkpoint = lambda *_: None
    pretrain.setup(
        "", config, out_dir=FOLDER, precision="bf16-mixed" if CUDA else "32-true", initial_checkpoint_dir=FOLDER,
        data=Prepared(), devices=1, logger_name="csv", optimizer={"class_path": "torch.optim.AdamW", "init_args": rule},
        train=TrainArgs(
            save_interval=None, global_batch_size=rows, micro_batch_size=TASK["micro_batch_size"], lr_warmup_steps=0,
            max_tokens=STEPS * rows * LENGTH, max_norm=1.0, min_lr=LR, tie_embeddings=MODEL["tie_word_embeddings"],
        ),
        eval=EvalArgs(interval=10**9, final_validation=False),
    )  # fmt: skip
    with next(FOLDER.rglob("metrics.csv")).open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def nanogpt() -> list[float]:
    """Losses of train.py: of the last micro-batch of each step, to four decimals, on crops that it draws itself."""
    os.chdir(TASK["nanogpt"])
    settings = {
        "dataset": TASK["nanogpt_data"], "out_dir": FOLDER, "eval_interval": 10**9, "eval_iters": 1, "max_iters": STEPS - 1,
        "gradient_accumulation_steps": TASK["accumulation"], "batch_size": TASK["micro_batch_size"], "block_size": LENGTH,
        "n_layer": MODEL["num_hidden_layers"], "n_head": MODEL["num_attention_heads"], "n_embd": MODEL["hidden_size"],
        "bias": False, "dropout": 0.0, "learning_rate": LR, "weight_decay": WEIGHT_DECAY, "beta1": BETAS[0], "beta2": BETAS[1],
        "grad_clip": 1.0, "decay_lr": False, "compile": TASK["compile"], "device": "cuda" if CUDA else "cpu",
        "dtype": "bfloat16" if CUDA else "float32", "always_save_checkpoint": False,
    }  # fmt: skip
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in settings.items())]
    sys.path[0] = TASK["nanogpt"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        runpy.run_path("train.py", run_name="__main__")
    return [float(loss) for loss in re.findall(r"^iter \d+: loss ([\d.]+)", shown.getvalue(), re.MULTILINE)]


if __name__ == "__main__":
    gate = Gate()
    programs = {"ours": ours, "transformers": transformers, "litgpt": litgpt, "nanogpt": nanogpt}
    losses = programs[NAME]()
    gate.report(losses=losses, torch=torch.__version__)
