"""The loss doctor: reads a training log of any framework, or walks a configuration's own loss, and names what is wrong."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from pretrain.config import Config, ConfigError, EngineConfig, accumulation, load
from pretrain.data.indexed import DataError
from pretrain.data.tokenizer import Tokenizer
from pretrain.doctor.findings import Diagnosis, summary
from pretrain.doctor.findings import diagnose as diagnose_log
from pretrain.doctor.log_formats import LogError, read_log
from pretrain.doctor.scale import Setup
from pretrain.model.config import ModelConfig, resolve_model, vocabulary
from pretrain.model.flops import num_parameters, vocabulary_rows
from pretrain.report import verdict

if TYPE_CHECKING:
    from pretrain.data.batches import Batch, TrainData
    from pretrain.model.transformer import Transformer

NOTHING_FOUND, FOUND, REFUSED = 0, 1, 2
_BLOCKS = 8  # of positions, in `initial`
_SHOWN_TOKENS = 10


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 looked and found nothing wrong, 1 found something, 2 the input cannot be used."""
    parser = argparse.ArgumentParser(
        description="Say whether a loss is the loss that it seems to be, and if not, what it is.",
        epilog="exit status: 0 nothing wrong found, 1 findings, 2 the input cannot be used",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="log | initial | chain")
    log = commands.add_parser("log", help="judge a training log: JSON lines, CSV, TensorBoard or text")
    log.add_argument("file", type=Path, metavar="FILE", help="the log, or the folder of a run")
    log.add_argument("--vocab-size", type=_several, metavar="V", help="token ids of the model; without it little can be said")
    log.add_argument("--accumulation", type=_positive, metavar="A", help="micro-batches per step and rank")
    log.add_argument("--world-size", type=_positive, metavar="W", help="number of ranks")
    log.add_argument("--sequence-length", type=_positive, metavar="T", help="tokens of a sequence")
    log.add_argument("--micro-batch-size", type=_positive, metavar="B", help="sequences in one forward on one rank")
    log.add_argument("--plot", type=Path, nargs="?", const=Path(), metavar="PNG", help="draw the curve (FILE.png)")
    settings = "settings follow as for launch/pretrain.py: --config FILE [--section.key value ...]"
    initial = commands.add_parser(
        "initial", help="the untrained model's loss on real batches beside ln V", description=settings, allow_abbrev=False
    )
    initial.add_argument("--samples", type=_positive, default=16, metavar="N", help="samples to measure (16)")
    chain = commands.add_parser(
        "chain",
        help="one real batch from the tokenizer to the shown number, each stage checked",
        description=settings,
        allow_abbrev=False,
    )
    chain.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights to use (default: the initial ones)")
    chain.add_argument("--ranks", type=_positive, metavar="W", help="ranks to share the batch (engine.world_size, or 1)")
    chain.add_argument("--micro-batches", type=_positive, default=8, metavar="N", help="at most so many are run (8)")
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command == "log" and rest:
        parser.error(f"unknown: {' '.join(rest)}")
    try:
        return {"log": about_log, "initial": about_initial, "chain": about_chain}[parsed.command](parsed, rest)
    except (LogError, DataError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def _several(text: str) -> int:
    if _positive(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: a vocabulary has at least 2 ids")
    return int(text)


# ---------------------------------------------------------------- log


def about_log(arguments: argparse.Namespace, _: list[str]) -> int:
    """Reads, judges, prints, draws."""
    names = ("vocab_size", "accumulation", "world_size", "sequence_length", "micro_batch_size")
    result = diagnose_log(read_log(arguments.file), Setup(**{name: getattr(arguments, name) for name in names}))
    print("\n".join(summary(result)))
    for note in result.notes:
        print(_wrapped("note: ", note))
    for finding in result.findings:
        print(_wrapped(f"FOUND {finding.fault}, {finding.certainty}: ", finding.text))
        print(_wrapped("  -> ", finding.advice))
    if not result.findings:
        print("nothing wrong found")
    if arguments.plot is not None:
        output = arguments.plot if arguments.plot.name else arguments.file.resolve().with_name(f"{arguments.file.name}.png")
        print(draw(result, output))
    return FOUND if result.findings else NOTHING_FOUND


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(head + text, 120, subsequent_indent=" " * 5, break_long_words=False, break_on_hyphens=False)


def draw(result: Diagnosis, output: Path) -> Path:
    """The shown curve and, where the findings tell, the true one, each with ln V, as a PNG file. Raises LogError, OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve, setup = result.curve, result.setup
    if curve is None:
        raise LogError(f"{result.log.name}: no finite loss to draw")
    panels = [("as shown", curve.loss, "#8a8a8a")]
    if result.explanation:
        panels.append((f"in nats per token (shown {result.explanation.claim()})", result.true, "#0072B2"))
    figure = Figure(figsize=(10, 3.6 * len(panels) + 0.6), dpi=150, layout="constrained")
    for axes, (title, values, color) in zip(np.ravel(figure.subplots(len(panels), sharex=True)), panels, strict=True):
        axes.plot(curve.steps, values, color=color, linewidth=1.2, marker="." if len(values) < 60 else "")
        bad = result.log.steps[~np.isfinite(result.log.loss)]
        axes.vlines(bad, 0.96, 1, transform=axes.get_xaxis_transform(), color="#c00000", linewidth=1.2)
        if setup.ln_v:
            axes.axhline(setup.ln_v, color="#D55E00", linewidth=1, linestyle=(0, (5, 4)))
            axes.annotate(f"ln {setup.vocab_size} = {setup.ln_v:.2f}", (1.0, setup.ln_v), xycoords=("axes fraction", "data"),
                          xytext=(-4, 4), textcoords="offset points", ha="right", color="#D55E00", fontsize=9)  # fmt: skip
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("loss")
        axes.margins(x=0.01, y=0.12)
        axes.grid(axis="y", color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(result.log.unit)
    figure.suptitle(result.log.name, fontweight="bold")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, output)
    return output


# ---------------------------------------------------------------- the parts of a configuration


@dataclass
class Parts:
    """What a run is made of, opened but not trained."""

    config: Config
    model: ModelConfig
    """Every null resolved."""
    tokenizer: Tokenizer | None
    data: TrainData


def open_parts(settings: list[str], ranks: int | None = None) -> Parts:
    """Raises ConfigError, DataError. `ranks`: that share the batch; None: engine.world_size, or 1."""
    from pretrain.data.batches import open_train

    config = load(settings, world_size=None, program="tools/diagnose_loss.py")
    ranks = ranks or config.engine.world_size or 1
    config = load([*settings, "--engine.world_size", str(ranks)], world_size=ranks, program="tools/diagnose_loss.py")
    tokenizer = Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else None
    vocab_size, data_ids = vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    fingerprint = tokenizer and tokenizer.fingerprint
    data = open_train(config.data, seed=config.run.seed, vocab_size=data_ids, tokenizer_fingerprint=fingerprint)
    model = resolve_model(config.model, vocab_size=vocab_size, sequence_length=config.data.sequence_length)
    return Parts(config, model, tokenizer, data)


def build_model(parts: Parts, checkpoint: Path | None = None) -> Transformer:
    """The initial model or that of a checkpoint, fp32, on the GPU where there is one. Raises DataError when it has no room."""
    import torch

    from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
    from pretrain.checkpoint.storage import load_weights
    from pretrain.model.transformer import build

    needed = 4 * num_parameters(parts.model).total
    device = "cuda" if torch.cuda.is_available() else "cpu"
    room = torch.cuda.mem_get_info()[0] if device == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.6 * room:
        raise DataError(
            f"the model needs {needed / 2**30:.1f} GiB in fp32 and the {device} has {room / 2**30:.1f}; "
            "use fewer layers (--model.num_hidden_layers 2), the loss of an untrained model hardly depends on them"
        )
    model = build(parts.model, "cpu", parts.config.run.seed)
    if checkpoint:
        try:
            load_weights(Checkpoint(checkpoint.resolve()), model)
        except CheckpointError as error:
            raise DataError(str(error)) from None
    return model.to(device).eval()


def nats_of(model: Transformer, batch: Batch, sample: int) -> tuple[np.ndarray, float]:
    """((T,) nats of each token of one sample, NaN where its label does not count; standard deviation of its logits).

    From the logits alone, in float64: an account of the loss that shares no code with the model's own.
    """
    import torch

    device = next(model.parameters()).device
    rows = [None if part is None else part[sample : sample + 1].to(device) for part in batch]
    with torch.no_grad():
        logits_TV = model(rows[0], documents_BT=rows[2])[0].double()
    labels_T = rows[1][0]
    nats_T = logits_TV.logsumexp(1) - logits_TV.gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels_T == -100, torch.nan, nats_T).cpu().numpy(), float(logits_TV.std(1).mean())


# ---------------------------------------------------------------- initial


def about_initial(arguments: argparse.Namespace, settings: list[str]) -> int:
    """The untrained loss: in all, by position, by source; and the verdict."""
    parts = open_parts(settings)
    model = build_model(parts)
    batch = parts.data.take(0, arguments.samples)
    sources = [parts.data.sources[number].name for number, _, _ in parts.data.sample_ids(0, arguments.samples)]
    lines, problems = initial_findings(model, parts.model, batch, sources)
    return _verdict(lines, problems)


def initial_findings(model: Transformer, config: ModelConfig, batch: Batch, sources: list[str]) -> tuple[list[str], list[str]]:
    """-> (figures, problems) of an untrained model on a batch; `sources`: of each sample."""
    valid = (batch.labels_BT != -100).numpy()
    problems = [verdict.label_problem(batch.tokens_BT.numpy(), batch.labels_BT.numpy())]
    lines = [f"{valid.shape[0]} samples of {valid.shape[1]:,} tokens, {valid.mean():.1%} of the labels count"]
    if not valid.any():
        return lines, ["every label is masked: there is no loss"]
    measured = [nats_of(model, batch, sample) for sample in range(len(sources))]
    nats_BT, logit_std = np.stack([nats for nats, _ in measured]), float(np.mean([std for _, std in measured]))
    loss, expected = float(np.nanmean(nats_BT)), math.log(config.vocab_size)
    lines.append(
        f"untrained loss {loss:.4f} nats per token; ln({config.vocab_size}) = {expected:.4f}; {loss / expected:.4f} times that"
    )
    lines.append(f"logits spread by {logit_std:.3f}, which adds about {logit_std**2 / 2:.3f}")
    problems.append(verdict.initial_problem(loss, config.vocab_size, vocabulary_rows(config), logit_std))
    edges = np.unique(np.linspace(0, valid.shape[1], _BLOCKS + 1).astype(int))
    blocks = {f"{a} to {b - 1}": nats_BT[:, a:b] for a, b in itertools.pairwise(edges.tolist())}
    by_source = {name: nats_BT[[source == name for source in sources]] for name in dict.fromkeys(sources)}
    for what, groups in (("positions", blocks), ("source", by_source)):
        groups = {name: nats[np.isfinite(nats)] for name, nats in groups.items() if np.isfinite(nats).any()}
        means = {name: float(nats.mean()) for name, nats in groups.items()}
        errors = {name: float(nats.std() / math.sqrt(nats.size)) for name, nats in groups.items()}
        lines += [f"  {what} {name:24} {means[name]:.4f} +- {errors[name]:.4f}" for name in groups]
        problems += verdict.uneven_problems(what, means, errors, config.vocab_size)
    return lines, [problem for problem in problems if problem]


def _verdict(lines: list[str], problems: list[str]) -> int:
    for line in lines:
        print(line)
    for problem in problems:
        print(_wrapped("FOUND: ", problem))
    if not problems:
        print("nothing wrong found")
    return FOUND if problems else NOTHING_FOUND


# ---------------------------------------------------------------- chain


def about_chain(arguments: argparse.Namespace, settings: list[str]) -> int:
    """One global batch from the tokenizer to the number on the screen."""
    parts = open_parts(settings, arguments.ranks)
    config, ranks = parts.config, parts.config.engine.world_size
    batch = parts.data.take(0, config.batch.global_batch_size)
    model = build_model(parts, arguments.checkpoint)
    micro_batches = split(batch, config.batch.micro_batch_size)
    run = micro_batches[: arguments.micro_batches]
    stages = [
        ("tokenizer", tokenizer_stage(parts, batch)),
        ("labels", label_stage(parts, batch)),
        ("mask", mask_stage(micro_batches)),
        ("logits", logit_stage(model, parts.model, batch)),
    ]
    whole = len(run) == len(micro_batches)
    sums = [own_sum(model, each) for each in run]
    stages.append(("sum", sum_stage(model, run, sums)))
    stages.append(("mean", mean_stage(run, sums, parts.model.vocab_size, arguments.checkpoint is not None)))
    if whole:
        stages.append(("accumulation, ranks", rank_stage(run, sums, accumulation(config.batch, ranks), ranks)))
    stages.append(("shown", shown_stage(parts, model, run, sums)))
    problems = []
    for number, (name, (lines, found)) in enumerate(stages, start=1):
        print(f"{number}. {name}")
        print("\n".join(f"   {line}" for line in lines))
        problems += [f"{name}: {problem}" for problem in found]
    if not whole:
        print(f"{len(run)} of {len(micro_batches)} micro-batches were run; --micro-batches {len(micro_batches)} runs all")
    return _verdict([], problems)


Stage = tuple[list[str], list[str]]
"""Lines of figures, and problems."""


def split(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """The micro-batches of a global batch, in the order of ranks and of their accumulation."""
    columns = [[None] * len(batch.tokens_BT) if part is None else part.split(micro_batch_size) for part in batch]
    return [type(batch)(*tensors) for tensors in zip(*columns, strict=False)]


def tokenizer_stage(parts: Parts, batch: Batch) -> Stage:
    """Sizes, and text of the data that survives encoding. What the tokenizer leaves out of any text, such as capitals, the data
    lacks too."""
    tokenizer, config = parts.tokenizer, parts.model
    rows = vocabulary_rows(config)
    lines = [
        f"the model has ids 0 to {config.vocab_size - 1:,} and {rows:,} embedding rows ({rows - config.vocab_size} padded)"
    ]
    if tokenizer is None:
        return [*lines, "no tokenizer.path: ids cannot be shown as text"], []
    lines.append(f"the tokenizer {parts.config.tokenizer.path} has {tokenizer.vocab_size:,} ids")
    text = tokenizer.decode(batch.tokens_BT[0, : 4 * _SHOWN_TOKENS].tolist())
    text = " ".join(text.split()[1:-1]) or text.strip("\ufffd")  # a sample may begin and end within a word or a character
    back = tokenizer.decode(tokenizer.encode(text))
    lines.append(f"{text!r} -> {len(tokenizer.encode(text))} ids -> {back!r}")
    problems = [] if back.split() == text.split() else [f"the tokenizer does not give back what it encodes: {back!r}"]
    if tokenizer.vocab_size != config.vocab_size:
        problems.append(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}; leave model.vocab_size null"
        )
    return lines, problems


def label_stage(parts: Parts, batch: Batch) -> Stage:
    """Ids beside their labels, decoded; range and shift."""
    tokens_BT, labels_BT = batch.tokens_BT.numpy(), batch.labels_BT.numpy()
    lines = [f"sample {_place(parts.data, 0)}; input -> label"]
    for token, label in zip(tokens_BT[0, :_SHOWN_TOKENS].tolist(), labels_BT[0, :_SHOWN_TOKENS].tolist(), strict=True):
        lines.append(f"  {token:>7} {_text(parts.tokenizer, token):14} -> {label:>7} {_text(parts.tokenizer, label)}")
    low, high = (
        int(min(tokens_BT.min(), labels_BT[labels_BT != -100].min(initial=0))),
        int(max(tokens_BT.max(), labels_BT.max())),
    )
    lines.append(f"ids {low} to {high:,} in {tokens_BT.size:,} inputs; allowed are 0 to {parts.model.vocab_size - 1:,}")
    problems = [verdict.label_problem(tokens_BT, labels_BT)]
    if low < 0 or high >= parts.model.vocab_size:
        problems.append(f"ids reach from {low} to {high}, the model has 0 to {parts.model.vocab_size - 1}")
    return lines, [problem for problem in problems if problem]


def _place(data: TrainData, position: int) -> str:
    number, epoch, sample = data.sample_ids(position, 1)[0]
    return f"{sample:,} of {data.sources[number].name}, epoch {epoch}"


def _text(tokenizer: Tokenizer | None, token: int) -> str:
    if token == -100:
        return "(does not count)"
    return json.dumps(tokenizer.decode([token]), ensure_ascii=False) if tokenizer else ""


def mask_stage(micro_batches: list[Batch]) -> Stage:
    """Labels that count, in every micro-batch."""
    valid = [int((each.labels_BT != -100).sum()) for each in micro_batches]
    every = micro_batches[0].labels_BT.numel()
    lines = [f"labels that count: {sum(valid):,} of {every * len(valid):,}; by micro-batch {min(valid):,} to {max(valid):,}"]
    return lines, [f"micro-batch {i} has no label that counts" for i, count in enumerate(valid) if not count]


def logit_stage(model: Transformer, config: ModelConfig, batch: Batch) -> Stage:
    """Shape, spread, and that no position sees what follows it."""
    import torch

    device = next(model.parameters()).device
    tokens_BT = batch.tokens_BT[:1].to(device)
    documents_BT = None if batch.documents_BT is None else batch.documents_BT[:1].to(device)
    half = tokens_BT.shape[1] // 2
    changed_BT = tokens_BT.clone()
    changed_BT[:, half:] = (changed_BT[:, half:] + 1) % config.vocab_size
    with torch.no_grad():
        logits_BTV = model(tokens_BT, documents_BT=documents_BT)
        other_BTV = model(changed_BT, documents_BT=documents_BT)
    moved = float((logits_BTV - other_BTV)[:, :half].abs().max()) if half else 0.0
    std, shape = float(logits_BTV.float().std()), tuple(logits_BTV.shape)
    lines = [f"logits {shape} for {tuple(tokens_BT.shape)} ids, standard deviation {std:.3f}"]
    lines.append(f"the second half of the ids changed: logits of the first half move by {moved:.1e}")
    problems = [] if bool(torch.isfinite(logits_BTV).all()) else ["logits are not finite"]
    if shape[-1] != config.vocab_size:
        problems.append(f"logits over {shape[-1]} ids, the vocabulary has {config.vocab_size}: padded ids take part")
    if moved > 1e-3 * max(1.0, std):
        problems.append("positions see the tokens after them: the attention is not causal")
    return lines, problems


def own_sum(model: Transformer, batch: Batch) -> float:
    """Nats of all labels that count, from the logits."""
    return float(sum(np.nansum(nats_of(model, batch, sample)[0]) for sample in range(len(batch.tokens_BT))))


def sum_stage(model: Transformer, run: list[Batch], sums: list[float]) -> Stage:
    """The model's loss_sum beside that of the logits."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        theirs = [float(model(*(part if part is None else part.to(device) for part in each)).loss_sum) for each in run]
    lines = [f"micro-batch 0: {theirs[0]:,.4f} nats from the model, {sums[0]:,.4f} from its logits in float64"]
    wrong = [i for i, (a, b) in enumerate(zip(theirs, sums, strict=True)) if not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-2)]
    return lines, [
        f"micro-batch {i}: the model's sum {theirs[i]:,.3f} is not that of its logits, {sums[i]:,.3f}" for i in wrong
    ]


def mean_stage(run: list[Batch], sums: list[float], vocab_size: int, trained: bool) -> Stage:
    """Sum over count, beside ln V."""
    count = sum(int((each.labels_BT != -100).sum()) for each in run)
    if not count:
        return ["no label counts"], []
    loss, expected = sum(sums) / count, math.log(vocab_size)
    lines = [f"{sum(sums):,.2f} nats / {count:,} labels = {loss:.4f}; ln({vocab_size}) = {expected:.4f}"]
    if trained:
        return lines, [] if loss < expected else [
            f"the checkpoint's loss {loss:.3f} is not below ln({vocab_size}): nothing was learned"
        ]
    return lines, [] if abs(loss / expected - 1) <= 0.03 else ["the untrained loss is not ln V: `initial` looks for the cause"]


def rank_stage(run: list[Batch], sums: list[float], per_rank: int, ranks: int) -> Stage:
    """Sums and counts by rank, the scaling of a backward pass, and what other scripts would show instead."""
    counts = [int((each.labels_BT != -100).sum()) for each in run]
    lines = []
    for rank in range(min(ranks, 4)):
        mine = slice(rank * per_rank, rank * per_rank + min(per_rank, 4))
        figures = ", ".join(f"{nats:,.1f} / {count:,}" for nats, count in zip(sums[mine], counts[mine], strict=True))
        lines.append(f"rank {rank}: {figures}{', ...' if per_rank > 4 else ''}")
    means = [nats / max(1, count) for nats, count in zip(sums, counts, strict=True)]
    return [
        *lines,
        f"shown is all nats / all labels of {ranks} ranks x {per_rank} micro-batches; each backward pass is scaled by "
        f"{ranks} / {sum(counts):,}, as engines average gradients over ranks",
        f"other scripts would show: the last micro-batch of rank 0, {means[per_rank - 1]:.4f}; the mean of means, "
        f"{np.mean(means):.4f}; the sum over the accumulation, {sum(means[:per_rank]):.2f}",
    ], []


def shown_stage(parts: Parts, model: Transformer, run: list[Batch], sums: list[float]) -> Stage:
    """The trainer's own step and meter on these micro-batches, in one process, with a learning rate of 0."""
    from pretrain.engines.start import start_engine
    from pretrain.model.transformer import Transformer
    from pretrain.optim.optimizer import build_optimizer
    from pretrain.report.metrics import Meter
    from pretrain.train import train_step

    config, count = parts.config, max(1, sum(int((each.labels_BT != -100).sum()) for each in run))
    engine = start_engine(EngineConfig(precision="fp32"))
    try:
        optimizer = replace(config.optimizer, name="adamw")
        engine.prepare(
            lambda: Transformer(parts.model), lambda module: build_optimizer(module, optimizer), 0.0, config.run.seed
        )
        engine.model.load_state_dict(model.state_dict())
        result = train_step(engine, [engine.to_device(each) for each in run], 0.0)
        meter = Meter(engine.device, engine.rank, engine.world_size)
        meter.add(result.loss_sum, result.tokens, result.grad_norm, result.applied)
        shown = meter.read(engine.all_reduce)
        for each in run:
            (engine.model(*engine.to_device(each)).loss_sum / count).backward()
        grads = [parameter.grad for parameter in engine.model.parameters()]
        grad_norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
    finally:
        engine.close()
    loss = sum(sums) / count
    lines = [
        f"loss of the trainer's step and meter {shown['loss']:.6f}; of the walk above {loss:.6f}",
        f"gradient norm of the trainer's step {shown['grad_norm']:.6f}; of the mean over {count:,} labels {grad_norm:.6f}",
    ]
    pairs = {"loss": (shown["loss"], loss), "gradient norm": (shown["grad_norm"], grad_norm)}
    return lines, [
        f"the trainer's {name} is {theirs:.6f}, the batch's {ours:.6f}: {theirs / ours:.4g} times that"
        for name, (theirs, ours) in pairs.items()
        if not math.isclose(theirs, ours, rel_tol=1e-3)
    ]


if __name__ == "__main__":
    sys.exit(main())
