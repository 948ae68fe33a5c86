"""The loss doctor: judges a training log of any framework, or traces the loss of a configuration, and names what is wrong.

    python tools/diagnose_loss.py log train.log --vocab-size 6400 --accumulation 25
    python tools/diagnose_loss.py initial --config FILE [--section.key value ...]
    python tools/diagnose_loss.py chain --config FILE [--section.key value ...]

Exit status: 0 nothing wrong found, or only what is merely possible; 1 findings; 2 the input cannot be used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from pretrain import UserError
from pretrain.config import Config, EngineConfig, accumulation, load
from pretrain.data.tokenizer import Tokenizer
from pretrain.doctor import untrained
from pretrain.doctor.diagnosis import Diagnosis
from pretrain.doctor.findings import diagnose, summary
from pretrain.doctor.scale import Setup
from pretrain.doctor.training_log import TrainingLog, read_log
from pretrain.engines.config import fewest_ranks, sample_ranks
from pretrain.model.config import ModelConfig
from pretrain.model.flops import num_parameters, vocabulary_rows
from pretrain.run import command_line

if TYPE_CHECKING:
    from pretrain.data.batches import Batch, TrainData
    from pretrain.model.transformer import Transformer
    from pretrain.run.parts import Parts

NOTHING_FOUND, FOUND = 0, 1
_BLOCKS = 8  # of positions, in `initial`
_SHOWN_TOKENS = 10
_LONG_LOG_BYTES = 50_000_000


def main(argv: list[str]) -> int:
    """Runs one of the commands; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="log | initial | chain")
    count = command_line.at_least(1)
    log = commands.add_parser("log", help="judge a training log: JSON lines, CSV, TensorBoard or text", allow_abbrev=False)
    log.set_defaults(config=[])
    log.add_argument("file", type=Path, metavar="FILE", help="the log, the folder of a run, or - for standard input")
    log.add_argument(
        "--vocab-size", type=command_line.at_least(2), metavar="V", help="token ids of the model; many checks need it"
    )
    log.add_argument("--accumulation", type=count, metavar="A", help="micro-batches per step and rank")
    log.add_argument("--world-size", type=count, metavar="W", help="number of ranks")
    log.add_argument("--sequence-length", type=count, metavar="T", help="tokens per sequence")
    log.add_argument("--micro-batch-size", type=count, metavar="B", help="sequences in one forward pass on one rank")
    log.add_argument("--loss", metavar="NAME", help="the loss to judge, as the file names it (default: the most frequent)")
    log.add_argument("--plot", type=Path, nargs="?", const=Path(), metavar="PNG", help="draw the curve (default: FILE.png)")
    initial = commands.add_parser(
        "initial", help="compare an untrained model's loss on real batches with ln V", allow_abbrev=False
    )
    initial.add_argument("--samples", type=count, default=16, metavar="N", help="samples to measure (default: %(default)s)")
    chain = commands.add_parser(
        "chain", help="follow one real batch from the tokenizer to the shown number, checking each stage", allow_abbrev=False
    )
    chain.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="weights to use (default: the initial ones)")
    chain.add_argument("--ranks", type=count, metavar="W", help="ranks that share the batch (default: engine.world_size, or 1)")
    chain.add_argument("--micro-batches", type=count, default=8, metavar="N", help="run at most N (default: %(default)s)")
    for command in (initial, chain):
        command_line.add_settings(command)
    options, settings = command_line.parse_with_settings(parser, argv)
    if options.command == "log":
        if settings:
            parser.error(f"unknown: {' '.join(settings)}")
        return judge_log(options)
    return (judge_initial if options.command == "initial" else judge_chain)(options, settings)


# ---------------------------------------------------------------- log


def judge_log(options: argparse.Namespace) -> int:
    """Reads a log, prints its figures and findings, and draws it if requested."""
    names = ("vocab_size", "accumulation", "world_size", "sequence_length", "micro_batch_size")
    log = read_with_progress(options.file, options.loss)
    result = diagnose(log, Setup(**{name: getattr(options, name) for name in names}))
    print("\n".join(summary(result)))
    for finding in result.findings:
        print(_wrapped(f"FOUND {finding.fault}, {finding.certainty}: ", finding.text))
        print(_wrapped("  -> ", finding.advice))
    for note in result.notes:
        print(_wrapped("note: ", note))
    if not result.is_wrong:
        print(_wrapped("", _conclusion(result)))
    if options.plot is not None:
        beside = Path("log.png") if str(options.file) == "-" else options.file.resolve().with_name(f"{options.file.name}.png")
        output = options.plot if options.plot.name else beside
        draw(result, output)
        print(output)
    return FOUND if result.is_wrong else NOTHING_FOUND


def _conclusion(result: Diagnosis) -> str:
    """The last line on a log without a finding, or with one that is merely possible."""
    if result.undecided:
        return f"not decided: {'; '.join(result.undecided)}. Nothing else wrong found"
    return "nothing else wrong found" if result.findings else "nothing wrong found"


def read_with_progress(path: Path, loss_name: str | None) -> TrainingLog:
    """The log in `path`; shows the progress on standard error if it is a long file. Raises LogError, OSError."""
    if not path.is_file() or path.stat().st_size < _LONG_LOG_BYTES:
        return read_log(path, loss_name)
    from pretrain.report.progress import Progress

    with Progress(path.name, path.stat().st_size) as progress:
        return read_log(path, loss_name, progress.update)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(head + text, 120, subsequent_indent=" " * 5, break_long_words=False, break_on_hyphens=False)


def draw(result: Diagnosis, output: Path) -> None:
    """Draws the shown curve and, if a factor was found, the true one, with ln V, as a PNG file. Raises UserError, OSError."""
    from pretrain.report.plot import Curves, draw_panels, save

    log = result.log
    if result.curve is None:
        raise UserError(f"{log.name}: has no finite loss above 0 to draw")
    panels = {"as shown": log.loss}
    if result.explanation:
        with np.errstate(invalid="ignore", divide="ignore"):
            panels[f"in nats per token (shown {result.explanation.claim()})"] = result.explanation.true(log.loss)
    lines = {f"ln({result.setup.vocab_size})": result.setup.ln_v} if result.setup.ln_v else {}
    unknown = np.full(len(log.steps), np.nan)
    curves = [Curves(name, log.steps, unknown, unknown, loss, reference_lines=lines) for name, loss in panels.items()]
    figure = draw_panels(curves, log.unit)
    figure.suptitle(log.name, fontweight="bold")
    save(figure, output)


# ---------------------------------------------------------------- the parts of a configuration


def open_settings(settings: list[str], ranks: int | None = None) -> tuple[Config, Parts]:
    """A configuration for so many ranks (None: engine.world_size, or the fewest that it allows), and its parts. Raises
    ConfigError, DataError."""
    from pretrain.run.parts import open_parts

    program = "tools/diagnose_loss.py"
    if ranks is None:
        engine = load(settings, world_size=None, program=program).engine
        ranks = engine.world_size or fewest_ranks(engine)
    config = load([*settings, "--engine.world_size", str(ranks)], world_size=ranks, program=program)
    return config, open_parts(config)


def build_model(model: ModelConfig, seed: int, checkpoint: Path | None = None) -> Transformer:
    """The initial model, or that of a checkpoint, in fp32, on a GPU if there is one. Raises UserError if it does not fit."""
    import torch

    from pretrain.checkpoint.manifest import Checkpoint
    from pretrain.checkpoint.storage import load_weights
    from pretrain.model.transformer import build

    needed = 4 * num_parameters(model).total
    device = "cuda" if torch.cuda.is_available() else "cpu"
    room = torch.cuda.mem_get_info()[0] if device == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.6 * room:
        raise UserError(
            f"the model needs {needed / 2**30:.1f} GiB in fp32, but the {device} has {room / 2**30:.1f}; "
            "use fewer layers (--model.num_hidden_layers 2): the loss of an untrained model hardly depends on them"
        )
    built = build(model, "cpu", seed)
    if checkpoint:
        load_weights(Checkpoint(checkpoint.resolve()), built)
    return built.to(device).eval()


def nats_of(model: Transformer, batch: Batch, sample: int) -> tuple[np.ndarray, float]:
    """((T,) nats of each token of one sample, NaN where its label does not count; standard deviation of its logits).

    Computed from the logits in float64, by code that the model's own loss does not share.
    """
    import torch

    device = next(model.parameters()).device
    rows = [None if part is None else part[sample : sample + 1].to(device) for part in batch.inputs]
    with torch.no_grad():
        logits_TV = model(rows[0], documents_BT=rows[2])[0].double()
    labels_T = rows[1][0]
    nats_T = logits_TV.logsumexp(1) - logits_TV.gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels_T == -100, torch.nan, nats_T).cpu().numpy(), float(logits_TV.std(1).mean())


# ---------------------------------------------------------------- initial


def judge_initial(options: argparse.Namespace, settings: list[str]) -> int:
    """Prints the untrained loss in total, by position and by source, and what is wrong with it."""
    config, parts = open_settings(settings)
    batch = parts.data.take(0, options.samples)
    sources = [parts.data.sources[number].name for number, _, _ in parts.data.sample_ids(0, options.samples)]
    lines, problems = initial_findings(build_model(parts.model, config.run.seed), parts.model, batch, sources)
    about, of_data = data_findings(parts.data)
    print("\n".join([*about, *lines]))
    return _conclude(of_data + problems)


def data_findings(data: TrainData) -> tuple[list[str], list[str]]:
    """(lines about generated data, problems of token files): the lowest loss that training on each source can reach."""
    from pretrain.data.checks import check_entropies
    from pretrain.data.shards import shortened

    uniform, lines, problems = data.reference_lines["uniform"], [], []
    for source in data.sources:
        if (floor := source.reference_lines.get("floor")) is not None:
            stays = f"nothing can be learned, so training stays at ln({data.vocab_size}) = {uniform:.4f}"
            falls = f"training can fall to {floor:.4f} nats per token, its floor, and not below"
            lines.append(f"data: {source.name} is generated, not text; {stays if floor > 0.99 * uniform else falls}")
        found = (each for file in source.files for each in check_entropies(file, source.name, data.vocab_size))
        problems += map(str, shortened(found))
    return lines, problems


def initial_findings(model: Transformer, config: ModelConfig, batch: Batch, sources: list[str]) -> tuple[list[str], list[str]]:
    """(figures, problems) of an untrained model on a batch; `sources`: the source of each sample."""
    valid = (batch.labels_BT != -100).numpy()
    problems = [untrained.label_problem(batch.tokens_BT.numpy(), batch.labels_BT.numpy())]
    lines = [f"{valid.shape[0]} samples of {valid.shape[1]:,} tokens, {valid.mean():.1%} of the labels count"]
    problems.append(untrained.id_problem(batch.tokens_BT.numpy(), batch.labels_BT.numpy(), config.vocab_size))
    problems.append(None if valid.any() else "every label is masked, so there is no loss")
    if reason := why_no_loss([batch], config.vocab_size):
        return [*lines, f"the model was not run: {reason}"], [problem for problem in problems if problem]
    measured = [nats_of(model, batch, sample) for sample in range(len(sources))]
    nats_BT, logit_std = np.stack([nats for nats, _ in measured]), float(np.mean([std for _, std in measured]))
    loss, expected = float(np.nanmean(nats_BT)), math.log(config.vocab_size)
    lines.append(
        f"untrained loss {loss:.4f} nats per token = {loss / expected:.4f} times ln({config.vocab_size}) = {expected:.4f}"
    )
    lines.append(f"standard deviation of the logits {logit_std:.3f}, which adds about {logit_std**2 / 2:.3f} nats")
    problems.append(untrained.initial_problem(loss, config.vocab_size, vocabulary_rows(config), logit_std))
    edges = np.unique(np.linspace(0, valid.shape[1], _BLOCKS + 1).astype(int))
    blocks = {f"{a} to {b - 1}": nats_BT[:, a:b] for a, b in itertools.pairwise(edges.tolist())}
    by_source = {name: nats_BT[[source == name for source in sources]] for name in dict.fromkeys(sources)}
    for what, groups in (("positions", blocks), ("source", by_source)):
        groups = {name: nats[np.isfinite(nats)] for name, nats in groups.items() if np.isfinite(nats).any()}
        means = {name: float(nats.mean()) for name, nats in groups.items()}
        errors = {name: float(nats.std() / math.sqrt(nats.size)) for name, nats in groups.items()}
        lines += [f"  {what} {name:24} {means[name]:.4f} +- {errors[name]:.4f}" for name in groups]
        problems += untrained.uneven_problems(what, means, errors, config.vocab_size)
    return lines, [problem for problem in problems if problem]


def _conclude(problems: list[str]) -> int:
    """Prints the problems; returns the exit status."""
    for problem in problems:
        print(_wrapped("FOUND: ", problem))
    if not problems:
        print("nothing wrong found")
    return FOUND if problems else NOTHING_FOUND


# ---------------------------------------------------------------- chain


def judge_chain(options: argparse.Namespace, settings: list[str]) -> int:
    """Follows one global batch from the tokenizer to the number on the screen."""
    config, parts = open_settings(settings, options.ranks)
    ranks, vocab_size = config.engine.world_size, parts.model.vocab_size
    groups = sample_ranks(config.engine, ranks)
    batch = parts.data.take(0, config.batch.global_batch_size)
    model = build_model(parts.model, config.run.seed, options.checkpoint)
    micro_batches = split(batch, config.batch.micro_batch_size)
    run = micro_batches[: options.micro_batches]
    about, problems = data_findings(parts.data)
    print("".join(f"{line}\n" for line in about), end="")
    problems += show_stages(
        1,
        {
            "tokenizer": tokenizer_stage(config.tokenizer.path, parts, batch),
            "labels": label_stage(parts, batch),
            "mask": mask_stage(micro_batches),
        },
    )
    if reason := why_no_loss(run, vocab_size):
        print(f"the model was not run: {reason}")
        return _conclude(problems)
    sums = [own_sum(model, each) for each in run]
    stages = {
        "logits": logit_stage(model, parts.model, batch),
        "sum": sum_stage(model, run, sums),
        "mean": mean_stage(run, sums, vocab_size, options.checkpoint is not None),
    }
    if complete := len(run) == len(micro_batches):
        stages["accumulation, ranks"] = rank_stage(run, sums, config.engine, accumulation(config.batch, groups), ranks)
    stages["shown"] = shown_stage(config, model, parts.model, run, sums)
    problems += show_stages(4, stages)
    if not complete:
        print(f"{len(run)} of {len(micro_batches)} micro-batches were run; --micro-batches {len(micro_batches)} runs all")
    return _conclude(problems)


Stage = tuple[list[str], list[str]]
"""(lines of figures, problems)."""


def show_stages(first: int, stages: dict[str, Stage]) -> list[str]:
    """Prints the figures of numbered stages, by name; returns their problems."""
    problems = []
    for number, (name, (lines, found)) in enumerate(stages.items(), start=first):
        print(f"{number}. {name}")
        print("\n".join(f"   {line}" for line in lines))
        problems += [f"{name}: {problem}" for problem in found]
    return problems


def why_no_loss(run: list[Batch], vocab_size: int) -> str | None:
    """The reason why these micro-batches have no loss to follow; None if they have one."""
    if any(untrained.id_problem(each.tokens_BT.numpy(), each.labels_BT.numpy(), vocab_size) for each in run):
        return "it has no embedding for ids outside its vocabulary"
    if not any(bool((each.labels_BT != -100).any()) for each in run):
        return "no label counts, so there is no loss"
    return None


def split(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """The micro-batches of a global batch, in the order of ranks and then of accumulation."""
    columns = [[None] * len(batch.tokens_BT) if part is None else part.split(micro_batch_size) for part in batch]
    return [type(batch)(*tensors) for tensors in zip(*columns, strict=False)]


def tokenizer_stage(path: str | None, parts: Parts, batch: Batch) -> Stage:
    """Compares sizes; checks that decoded text of the data, which lacks all that the tokenizer drops, survives a round trip."""
    tokenizer, config = parts.tokenizer, parts.model
    rows = vocabulary_rows(config)
    lines = [
        f"the model has ids 0 to {config.vocab_size - 1:,} and {rows:,} embedding rows ({rows - config.vocab_size} padded)"
    ]
    if tokenizer is None:
        return [*lines, "no tokenizer.path: ids cannot be shown as text"], []
    lines.append(f"the tokenizer {path} has {tokenizer.vocab_size:,} ids")
    text = tokenizer.decode([i for i in batch.tokens_BT[0, : 4 * _SHOWN_TOKENS].tolist() if 0 <= i < tokenizer.vocab_size])
    text = " ".join(text.split()[1:-1]) or text.strip("\ufffd")  # a sample may begin and end inside a word or character
    back = tokenizer.decode(tokenizer.encode(text))
    lines.append(f"{text!r} -> {len(tokenizer.encode(text))} ids -> {back!r}")
    problems = [] if back.split() == text.split() else [f"the tokenizer does not give back what it encodes: {back!r}"]
    if tokenizer.vocab_size != config.vocab_size:
        problems.append(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}; leave model.vocab_size null"
        )
    return lines, problems


def label_stage(parts: Parts, batch: Batch) -> Stage:
    """Decodes ids and their labels; checks their range and shift."""
    tokens_BT, labels_BT = batch.tokens_BT.numpy(), batch.labels_BT.numpy()
    lines = [f"sample {_place(parts.data, 0)}; input -> label"]
    for token, label in zip(tokens_BT[0, :_SHOWN_TOKENS].tolist(), labels_BT[0, :_SHOWN_TOKENS].tolist(), strict=True):
        lines.append(f"  {token:>7} {_text(parts.tokenizer, token):14} -> {label:>7} {_text(parts.tokenizer, label)}")
    low, high, last = int(tokens_BT.min()), int(tokens_BT.max()), parts.model.vocab_size - 1
    lines.append(f"ids {low:,} to {high:,} in {tokens_BT.size:,} inputs; allowed: 0 to {last:,}")
    problems = [untrained.label_problem(tokens_BT, labels_BT), untrained.id_problem(tokens_BT, labels_BT, last + 1)]
    return lines, [problem for problem in problems if problem]


def _place(data: TrainData, position: int) -> str:
    number, epoch, sample = data.sample_ids(position, 1)[0]
    return f"{sample:,} of {data.sources[number].name}, epoch {epoch}"


def _text(tokenizer: Tokenizer | None, token: int) -> str:
    if token == -100:
        return "(does not count)"
    if tokenizer is None:
        return ""
    return json.dumps(tokenizer.decode([token]), ensure_ascii=False) if 0 <= token < tokenizer.vocab_size else "(no such id)"


def mask_stage(micro_batches: list[Batch]) -> Stage:
    """Counts the labels that are not masked, per micro-batch."""
    valid = [int((each.labels_BT != -100).sum()) for each in micro_batches]
    every = micro_batches[0].labels_BT.numel()
    lines = [f"labels that count: {sum(valid):,} of {every * len(valid):,}; per micro-batch {min(valid):,} to {max(valid):,}"]
    return lines, [f"micro-batch {i} has no label that counts" for i, count in enumerate(valid) if not count]


def logit_stage(model: Transformer, config: ModelConfig, batch: Batch) -> Stage:
    """Checks shape and finiteness, and that no position sees later tokens."""
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
    lines.append(f"with other ids in the second half, logits of the first half move by {moved:.1e}")
    problems = [] if bool(torch.isfinite(logits_BTV).all()) else ["logits are not finite"]
    if shape[-1] != config.vocab_size:
        problems.append(f"logits over {shape[-1]} ids, the vocabulary has {config.vocab_size}: padded ids take part")
    if moved > 1e-3 * max(1.0, std):
        problems.append("positions see later tokens: the attention is not causal")
    return lines, problems


def own_sum(model: Transformer, batch: Batch) -> float:
    """Nats of all labels that count, computed from the logits."""
    return float(sum(np.nansum(nats_of(model, batch, sample)[0]) for sample in range(len(batch.tokens_BT))))


def sum_stage(model: Transformer, run: list[Batch], sums: list[float]) -> Stage:
    """Compares the model's own sum of nats with that from the logits."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        theirs = [float(model(*(part if part is None else part.to(device) for part in each.inputs)).loss_sum) for each in run]
    lines = [f"micro-batch 0: {theirs[0]:,.4f} nats from the model, {sums[0]:,.4f} from its logits in float64"]
    wrong = [i for i, (a, b) in enumerate(zip(theirs, sums, strict=True)) if not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-2)]
    problem = "micro-batch {}: the model's sum {:,.3f} is not that from its logits, {:,.3f}"
    return lines, [problem.format(i, theirs[i], sums[i]) for i in wrong]


def mean_stage(run: list[Batch], sums: list[float], vocab_size: int, trained: bool) -> Stage:
    """Divides sum by count and compares with ln V."""
    count = sum(int((each.labels_BT != -100).sum()) for each in run)
    if not count:
        return ["no label counts"], []
    loss, expected = sum(sums) / count, math.log(vocab_size)
    lines = [f"{sum(sums):,.2f} nats / {count:,} labels = {loss:.4f}; ln({vocab_size}) = {expected:.4f}"]
    if trained:
        problem = f"the checkpoint's loss {loss:.3f} is not below ln({vocab_size}): it has learned nothing"
        return lines, [] if loss < expected else [problem]  # NaN is a problem, too
    problem = "the untrained loss is not ln V; the command `initial` looks for the cause"
    return lines, [] if abs(loss / expected - 1) <= 0.03 else [problem]


def rank_stage(run: list[Batch], sums: list[float], engine: EngineConfig, per_rank: int, ranks: int) -> Stage:
    """Shows sums and counts per rank, the scaling of a backward pass, and the numbers that other scripts would show instead.

    Ranks that share sequences appear as one, with the sums over their parts."""
    counts = [int((each.labels_BT != -100).sum()) for each in run]
    groups, share = sample_ranks(engine, ranks), ranks // sample_ranks(engine, ranks)
    lines = []
    for group in range(min(groups, 4)):
        mine = slice(group * per_rank, group * per_rank + min(per_rank, 4))
        figures = ", ".join(f"{nats:,.1f} / {count:,}" for nats, count in zip(sums[mine], counts[mine], strict=True))
        who = f"rank {group}" if share == 1 else f"ranks {group * share} to {(group + 1) * share - 1} together"
        lines.append(f"{who}: {figures}{', ...' if per_rank > 4 else ''}")
    means = [nats / max(1, count) for nats, count in zip(sums, counts, strict=True)]
    averaging = ranks // engine.parallel.tensor
    several = "" if groups == 1 else "s"
    split = f"{groups} rank{several}" if share == 1 else f"{groups} group{several} of {share} ranks"
    split = f"{split} x {per_rank} micro-batches"
    return [
        *lines,
        f"the shown loss is all nats / all labels of {split}; each backward pass is scaled by {averaging} / {sum(counts):,}, "
        f"because engines average gradients over {'ranks' if averaging == ranks else f'{averaging} ranks'}",
        f"other scripts would show: the last micro-batch of rank 0, {means[per_rank - 1]:.4f}; the mean of means, "
        f"{np.mean(means):.4f}; the sum over the accumulation, {sum(means[:per_rank]):.2f}",
    ], []


def shown_stage(config: Config, model: Transformer, resolved: ModelConfig, run: list[Batch], sums: list[float]) -> Stage:
    """Compares with the trainer's own step and meter on these micro-batches, in one process, with a learning rate of 0."""
    from pretrain.engines.start import start_engine
    from pretrain.model.transformer import Transformer
    from pretrain.optim.optimizer import build_optimizer
    from pretrain.report.metrics import Meter
    from pretrain.train import train_step

    count = max(1, sum(int((each.labels_BT != -100).sum()) for each in run))
    engine = start_engine(EngineConfig(precision="fp32", compile="none"))
    try:
        optimizer = replace(config.optimizer, name="adamw")
        engine.prepare(lambda: Transformer(resolved), lambda module: build_optimizer(module, optimizer), 0.0, config.run.seed)
        engine.model.load_state_dict(model.state_dict())
        result = train_step(engine, [engine.to_device(each) for each in run], 0.0)
        meter = Meter(engine.device, engine.rank, engine.world_size)
        meter.add(result.loss_sum, result.tokens, result.grad_norm, result.applied)
        shown = meter.read(engine.all_reduce)
        for each in run:
            (engine.model(*engine.to_device(each).inputs).loss_sum / count).backward()
        grads = [parameter.grad for parameter in engine.model.parameters()]
        grad_norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
    finally:
        engine.close()
    loss = sum(sums) / count
    lines = [
        f"loss of the trainer's step and meter {shown['loss']:.6f}; from the stages above {loss:.6f}",
        f"gradient norm of the trainer's step {shown['grad_norm']:.6f}; of the mean loss over {count:,} labels {grad_norm:.6f}",
    ]
    pairs = {"loss": (shown["loss"], loss), "gradient norm": (shown["grad_norm"], grad_norm)}
    return lines, [
        f"the trainer's {name} is {theirs:.6f}, but the batch's is {ours:.6f}, so it is {theirs / ours:.4g} times that"
        for name, (theirs, ours) in pairs.items()
        if not math.isclose(theirs, ours, rel_tol=1e-3)
    ]


if __name__ == "__main__":
    sys.exit(command_line.run(main))
