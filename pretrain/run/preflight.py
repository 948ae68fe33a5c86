"""Problems found before a run costs money: in data, arithmetic, storage and surroundings.

`preflight` checks everything that needs no device, in seconds, on a login node; `at_start` is its quick part, run by every job.
A finding has a stable name and either stops a run or warns; a fact is one line of information. A correct configuration has no
findings.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pretrain import stages
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
from pretrain.config import Config, ConfigError, DataConfig, Problem, SourceConfig, batch_product, validate, work_of
from pretrain.data import checks, shards, tasks
from pretrain.data.batches import MASKED, Batch, TrainData, block_length_of
from pretrain.data.checks import Finding
from pretrain.data.errors import StoreError, TaskError
from pretrain.data.indexed import DataError, DataMissing, TokenFile
from pretrain.data.reads import OpenFiles
from pretrain.data.remote import is_url
from pretrain.data.store import Store, room
from pretrain.data.tokenizer import Tokenizer
from pretrain.doctor.untrained import label_problem
from pretrain.engines import fp8
from pretrain.engines.base import Engine
from pretrain.engines.config import fewest_ranks, sample_ranks, slow_links
from pretrain.engines.mesh import Mesh
from pretrain.model.config import ModelConfig, vocabulary
from pretrain.run import fit, mask_certificate, resume, surroundings
from pretrain.run.length import Length, plan
from pretrain.run.mirror_store import open_store
from pretrain.run.parts import Parts, open_parts, open_tokenizer
from pretrain.run.receipt import run_facts

MOST_PASSES = 16  # Muennighoff et al. 2023: up to 4 passes are nearly as good as new text, after 16 nothing is left to gain
_BLEND_ERROR = 1e-6  # more than the relative rounding of shares in order.Blend
_TOKENS_SHOWN, _CHARACTERS_SHOWN = 8, 160


@dataclass
class Report:
    """The result of a preflight."""

    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """True if a finding stops the run."""
        return any(finding.stops for finding in self.findings)


# ---------------------------------------------------------------- all checks, and the quick ones


def preflight(config: Config, ranks: int | None = None) -> Report:
    """All checks that need no device. ranks: processes of the run; None: engine.world_size, else unknown."""
    report, folder = Report(), Path(config.run.directory) / config.run.name
    report.findings += surroundings.directory_findings(folder) + surroundings.sink_findings(config)
    report.findings += (
        surroundings.wandb_findings(config) + surroundings.build_locks(config) + surroundings.port_findings(ranks)
    )
    report.findings += mirror_findings(config)
    report.facts += batch_facts(config, ranks)
    report.findings += batch_findings(config, ranks)
    tokenizer, found = _open_tokenizer(config)
    report.findings += found
    model_ids, data_ids = vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    if model_ids is None:
        return report
    report.findings += _file_findings(config, tokenizer, data_ids, report.facts)
    try:
        parts = open_parts(config, tokenizer)
    except TaskError as error:
        report.findings.append(Finding("task-refused", "evaluate.tasks", str(error), stops=True))
        return report
    except DataError as error:
        if not report.stops:
            report.findings.append(Finding("data-refused", "data", str(error), stops=True))
        return report
    except ConfigError as error:
        report.findings += [Finding("settings-refused", each.key, each.message, stops=True) for each in error.problems]
        return report
    report.findings += [*precision_findings(config, parts.model), *tasks.findings(parts.tasks)]
    batch = parts.data.take(0, min(4, config.batch.global_batch_size))
    report.facts += describe_batch(batch, tokenizer)
    report.findings += first_batch_findings(batch, tokenizer)
    resuming = resume_findings(config, parts, folder / "checkpoints")
    try:
        length = plan(config, parts.data, _state_to_resume(config, folder / "checkpoints"))
    except ConfigError as error:
        found = [Finding("schedule-too-long", each.key, each.message, stops=True) for each in error.problems]
        report.findings += resuming or found
        return report
    parts = parts._replace(data=length.place(parts.data))
    report.facts += run_facts(config, parts, length, ranks or config.engine.world_size)
    report.findings += run_findings(config, parts.data, length)
    report.findings += surroundings.storage_findings(config, parts.model, folder, length.total_steps) + resuming
    if not report.stops:
        try:
            report.facts.append(f"masks: {mask_certificate.certify_here(config, parts.model)}")
        except mask_certificate.MaskBroken as error:
            report.findings.append(Finding("mask-broken", "model", str(error), stops=True))
    return report


def _state_to_resume(config: Config, folder: Path) -> dict | None:
    """The state of the checkpoint from which the run would start, not verified; None: there is none that can be read."""
    with contextlib.suppress(ConfigError, CheckpointError, DataError, StoreError):
        found, _ = resume.preview(config, folder)
        return found and found.state()
    return None


def mirror_findings(config: Config) -> list[Finding]:
    """Checks that checkpoint.mirror can be written, read and cleaned up."""
    try:
        if store := open_store(config):
            name = f"preflight-{store.job}"
            store.write(name, name.encode())
            if store.read(name) != name.encode():
                raise DataError(f"{store.url}: what is written reads differently")
            store.remove([name])
    except (DataError, StoreError) as error:
        return [Finding("mirror-unusable", "checkpoint.mirror", str(error), stops=True)]
    return []


def at_start(config: Config, engine: Engine, parts: Parts, found: Checkpoint | None) -> list[Finding]:
    """The quick checks, before the model is built; rank 0 checks, all ranks agree. A collective. -> warnings, on rank 0.

    found: the checkpoint from which the run resumes.

    Raises ConfigError for what stops a run. Too small a disk only warns here: a resumed run may free some of it.
    """
    findings: list[Finding] = []
    if engine.rank == 0:
        length = plan(config, parts.data, found and found.state())
        data = length.place(parts.data)
        folder = Path(config.run.directory) / config.run.name
        findings += _quick_file_findings(parts) if not config.data.synthetic else []
        findings += surroundings.sink_findings(config) + surroundings.build_locks(config) + run_findings(config, data, length)
        findings += [*precision_findings(config, parts.model), *tasks.findings(parts.tasks)]
        findings += fit.memory_findings(config, parts.model, engine.world_size, fit.device_gib(engine), engine.device_name)
        if per_node := engine.place.local_world_size:
            links = slow_links(config.engine, work_of(config, parts.model), engine.world_size, per_node)
            findings += [Finding("slow-link", each.key, each.message) for each in links]
        findings += [
            each._replace(stops=False)
            for each in surroundings.storage_findings(config, parts.model, folder, length.total_steps)
        ]
    stops = [each for each in findings if each.stops]
    if engine.broadcast(len(stops)):
        problems = [Problem(each.name, each.text, each.where) for each in stops]
        raise ConfigError(problems or [Problem("preflight", "rank 0 found a problem that stops this run, and reports it")])
    return findings


# ---------------------------------------------------------------- data


def _open_tokenizer(config: Config) -> tuple[Tokenizer | None, list[Finding]]:
    try:
        return open_tokenizer(config), []
    except DataError as error:
        name = "tokenizer-damaged" if any(Path(config.tokenizer.path).glob("tokenizer*")) else "tokenizer-missing"
        return None, [Finding(name, "tokenizer.path", str(error), stops=True)]


def _file_findings(config: Config, tokenizer: Tokenizer | None, vocab_size: int, facts: list[str]) -> list[Finding]:
    """Checks of all token files, one by one and against each other."""
    found: list[Finding] = []
    opened: dict[str, list[TokenFile]] = {"train": [], "valid": []}
    open_files = OpenFiles(store=Store(config.data.cache_directory, config.data.cache_gib))
    block_length = block_length_of([each.data for each in stages.settings(config)])
    end, unknown = (tokenizer.end_of_document_id, tokenizer.unknown_ids) if tokenizer else (None, frozenset())
    model = {"vocab_size": vocab_size, "tokenizer_fingerprint": tokenizer and tokenizer.fingerprint}
    valid = [(f"data.valid[{i}]", source) for i, source in enumerate(config.data.valid)]
    for key, sources in (("train", stages.sources(config)), ("valid", valid)):
        for place, source in sources:
            where, least = f"{place}.path", block_length + 1 if key == "train" else 2
            files, problems = _open_files(source, where, vocab_size, open_files)
            if files:
                problems += checks.check_files(files, where, config.data, **model, least_tokens=least)
                problems += checks.check_shards(files, where, block_length) if key == "train" else []
                problems += _text_findings(files, where, vocab_size, end, unknown) + checks.check_checksums(files, where)
                problems += _without_sidecar(files, where) if tokenizer else []
                facts += file_facts(files, end)
            opened[key] += files
            found += shortened(problems)
    return found + _copy_findings(opened["train"], opened["valid"], end, facts)


def _text_findings(
    files: list[TokenFile], where: str, vocab_size: int, end: int | None, unknown: frozenset[int]
) -> list[Finding]:
    found = []
    for file in files:
        found += checks.check_sample(file, where, vocab_size=vocab_size, end_of_document_id=end, unknown_ids=unknown)
        found += checks.check_entropies(file, where, vocab_size)
    return found


def _without_sidecar(files: list[TokenFile], where: str) -> list[Finding]:
    text = "has no metadata sidecar, so its tokenizer is unknown; tools/tokenize_corpus.py writes one"
    return [Finding("no-seal", where, f"{file.path} {text}") for file in files if file.sidecar is None]


def shortened(findings: Iterable[Finding]) -> list[Finding]:
    """The first few of each name, and how many more there are: a thousand shards often have the same problem."""
    named: dict[str, list[Finding]] = {}
    for each in findings:
        named.setdefault(each.name, []).append(each)
    return [
        each if isinstance(each, Finding) else same[0]._replace(text=each)
        for same in named.values()
        for each in shards.shortened(same)
    ]


def _quick_file_findings(parts: Parts) -> list[Finding]:
    """Checks on a sample of each file, and on the entropies in its metadata sidecar, if it has one."""
    train, valid = parts.data.sources, [each.source for each in parts.valid]
    files = [(f"{source.where}.path", source) for source in [*train, *valid]]
    found = _same_files(
        [file for source in train for file in source.files], [file for source in valid for file in source.files]
    )
    for where, source in files:
        problems = []
        for file in source.files:
            problems += checks.check_sample(file, where, vocab_size=parts.data.vocab_size, end_of_document_id=None)
            problems += checks.check_entropies(file, where, parts.data.vocab_size) if source.sidecar else []
        found += shortened(problems)
    return found


def _open_files(
    source: SourceConfig, where: str, vocab_size: int, open_files: OpenFiles
) -> tuple[list[TokenFile], list[Finding]]:
    try:
        return shards.open_shards(source.path, source.dtype, vocab_size, open_files=open_files), []
    except DataMissing as error:
        return [], [Finding("data-missing", where, str(error), stops=True)]
    except (DataError, OSError) as error:
        return [], [Finding("data-damaged", where, str(error), stops=True)]


def file_facts(files: list[TokenFile], end: int | None) -> list[str]:
    """Describes the content of the token files of a source, in two or three lines."""
    counts = [file.num_documents for file in files]
    documents = f" in {sum(counts):,} documents" if all(counts) else ", without a document index"
    names = files[0].path if len(files) == 1 else f"{files[0].path} to {files[-1].path} ({len(files):,} files)"
    tokens, kind, total = shards.common_sample(files), shards.common_dtype(files), sum(file.num_tokens for file in files)
    line = f"{names}: {total:,} tokens ({kind.name}){documents}, ids up to {tokens.max():,} in a sample"
    sidecar = None
    with contextlib.suppress(DataError):  # they contradict each other, which is a finding
        sidecar = shards.common_sidecar(files)
    if sidecar:
        line += f", {sidecar.max_id:,} in the sidecar; {sidecar.utf8_bytes / sidecar.num_tokens:.2f} bytes of text per token"
        end = sidecar.end_of_document_id
    lines = [line]
    if end is not None:
        count = int((tokens == end).sum())
        often = f"one in {len(tokens) / count:,.0f} tokens" if count else "never"
        lines.append(f"  end-of-document id {end}: {often} in a sample")
    if all(counts):
        lines.append(f"  tokens per document, quantiles: {checks.length_quantiles(files)}")
    return lines


def _copy_findings(train: list[TokenFile], valid: list[TokenFile], end: int | None, facts: list[str]) -> list[Finding]:
    shares = checks.duplicates(train, valid, end) if train else None
    if shares is None:  # the ends of documents are unknown
        return _same_files(train, valid)
    extent = "all" if shares.complete else "a sample of"
    facts.append(
        f"duplicates: {shares.train:.2%} of the training tokens are in repeated documents"
        + (f", {shares.valid:.2%} of the validation tokens in training documents" if valid else "")
        + f" ({extent} {shares.documents:,} documents)"
    )
    found = []
    if shares.train > 0.1:
        text = f"{shares.train:.0%} of the tokens are in repeated documents, which a model memorizes; remove them"
        found.append(Finding("duplicate-documents", "data.train", text))
    if shares.valid > 0.01:
        text = f"{shares.valid:.0%} of the validation tokens are training documents, so the validation loss will look too good"
        found.append(Finding("validation-overlap", "data.valid", f"{text}; split by document with tools/tokenize_corpus.py"))
    return found


def _same_files(train: list[TokenFile], valid: list[TokenFile]) -> list[Finding]:
    known = {file.fingerprint(2) for file in train}
    text = "is also in data.train, so the validation loss will look too good; use text that is not trained on"
    same = [file.path for file in valid if file.fingerprint(2) in known]
    return shortened(Finding("validation-overlap", "data.valid", f"{path} {text}") for path in same)


def describe_batch(batch: Batch, tokenizer: Tokenizer | None) -> list[str]:
    """Shows the first sample, and its first inputs beside their labels."""
    tokens, labels = batch.tokens_BT[0].tolist(), batch.labels_BT[0].tolist()
    masked = float((batch.labels_BT == MASKED).double().mean())
    decode: Callable[[list[int]], str] = (lambda ids: repr(tokenizer.decode(ids))) if tokenizer else (lambda ids: "")
    lines = [f"first sample: {decode(tokens)[:_CHARACTERS_SHOWN] or tokens[:_TOKENS_SHOWN]}... ({masked:.1%} of labels masked)"]
    for token, label in list(zip(tokens, labels, strict=True))[:_TOKENS_SHOWN]:
        beside = "masked" if label == MASKED else f"label {label:>6} {decode([label])}"
        lines.append(f"  input {token:>6} {decode([token]):<16} {beside}")
    if batch.documents_BT is not None:
        lines.append(f"  documents in it: {int(batch.documents_BT[0].max()) + 1}")
    return lines


def first_batch_findings(batch: Batch, tokenizer: Tokenizer | None) -> list[Finding]:
    """Checks that the labels are the next tokens, and that the ids are text for this tokenizer."""
    found = []
    if not bool((batch.labels_BT != MASKED).any()):
        found.append(
            Finding("labels-all-masked", "data", "every label of the first batch is masked: nothing can be learned", True)
        )
    elif problem := label_problem(batch.tokens_BT.numpy(), batch.labels_BT.numpy()):
        found.append(Finding("labels-wrong", "data", f"in the first batch {problem}", stops=True))
    if tokenizer:
        # A window may begin and end within a character, so broken ends do not count.
        texts = [tokenizer.decode(row).strip("\ufffd") for row in batch.tokens_BT.tolist()]
        broken, length = sum(text.count("\ufffd") for text in texts), sum(map(len, texts))
        if broken > 0.05 * max(1, length):
            share = f"{broken / max(1, length):.0%} of the decoded characters of the first batch are not valid text"
            found.append(Finding("text-garbled", "tokenizer.path", f"{share}: is this the tokenizer that made the data?"))
    return found


# ---------------------------------------------------------------- arithmetic


def batch_facts(config: Config, ranks: int | None) -> list[str]:
    """Shows the global batch, and ranks that share a model or a sequence, as products."""
    engine, batch, length = config.engine, config.batch, config.data.sequence_length
    tokens = f"times {length:,} tokens = {batch.global_batch_size * length:,} tokens per step"
    ranks = ranks or engine.world_size
    if ranks and ranks % fewest_ranks(engine) == 0:
        mesh = Mesh(engine, 0, ranks)
        return [f"batch: {batch_product(config, ranks)}; {tokens}", *([f"mesh: {mesh}"] if mesh.cut else [])]
    groups = batch.global_batch_size // batch.micro_batch_size
    possible = range(fewest_ranks(engine), 4097, fewest_ranks(engine))
    fitting = ", ".join(str(n) for n in possible if groups % sample_ranks(engine, n) == 0)
    return [f"batch: {batch.global_batch_size} sequences per step; {tokens}. Possible numbers of ranks: {fitting or 'none'}"]


def batch_findings(config: Config, ranks: int | None) -> list[Finding]:
    """Finds settings that do not fit the number of ranks."""
    problems = validate(config, ranks or config.engine.world_size or fewest_ranks(config.engine))
    return [Finding("batch-arithmetic", problem.key, problem.message, stops=True) for problem in problems]


def run_findings(config: Config, data: TrainData, length: Length) -> list[Finding]:
    """Problems of weights, schedule and data together."""
    found = weights_findings(config, data) + schedule_findings(length)
    found += store_findings(config.data, data.sources)
    return found + epoch_findings(data, length) + pass_findings(data, length.position)


def store_findings(data: DataConfig, sources: list) -> list[Finding]:
    """Finds a cache in which the tokens that come from a store have no room."""
    files = [file for source in sources for file in source.files if is_url(file.path)]
    needed = sum(file.num_tokens * file.dtype.itemsize for file in files)
    if data.cache_gib == 0 or needed <= room(data.cache_gib):
        return []
    text = f"has no room for the {needed / 2**30:,.1f} GiB of tokens that come from a store, so every sample is fetched by "
    text += f"itself, in each epoch again; where the disk allows it, {math.ceil(needed / room(1.0))} fetches everything once"
    return [Finding("cache-too-small", "data.cache_gib", text)]


def schedule_findings(length: Length) -> list[Finding]:
    """Finds learning rates that are probably mistakes."""
    found = []
    for curve in length.curves:
        schedule, peak, steps = curve.schedule, curve.peak_lr, curve.end - curve.step
        if not 1e-7 <= peak <= 0.1:
            text = f"peak {peak:.3g}; nearly every model trains between 1e-5 and 1e-2"
            found.append(Finding("lr-out-of-range", "optimizer.lr", text))
        if curve.course:  # its steps are not of one size; the start of the run was checked
            left, lowest = steps - curve.course.step, schedule.final_lr_fraction * peak
            if schedule.name != "constant" and curve.course.decayed == 1 and left > 0:
                text = f"the decay is complete, so the remaining {left:,} steps stay at {lowest:.3g}; resume a checkpoint from "
                text += "before the decay (checkpoint.resume), or change a key of schedule"
                found.append(Finding("lr-ends-early", "schedule", text))
            continue
        if schedule.warmup_steps > 0.5 * steps:
            text = f"{schedule.warmup_steps:,} of {steps:,} steps are warm-up; 1 to 10 % is usual"
            found.append(Finding("warmup-too-long", "schedule.warmup_steps", text))
        end = schedule.warmup_steps + (schedule.decay_steps or steps)
        if schedule.name in ("cosine", "linear") and end < 0.9 * steps:
            text = f"the decay ends at step {end:,} of {steps:,}, and the rate stays at its lowest after that; "
            found.append(Finding("lr-ends-early", "schedule.decay_steps", f"{text}null decays to the end"))
    return found


def precision_findings(config: Config, model: ModelConfig) -> list[Finding]:
    """Finds settings with which fp8 cannot run, or is no faster than bf16. Whether the device can is asked by the engine."""
    if config.engine.precision != "fp8":
        return []
    found, width = [], model.hidden_size
    shared = model.moe and model.moe.num_shared_experts * model.moe.moe_intermediate_size
    sizes = [model.num_attention_heads * model.head_dim, shared if model.moe else model.intermediate_size]
    if not any(fp8.is_wide(size, width) for size in sizes):
        text = f"fp8 takes matrices of at least {fp8.NARROWEST} rows and columns, both multiples of {fp8.MULTIPLE}, and the "
        text += f"blocks of this model (hidden_size {width}) have none; use bf16"
        found.append(Finding("fp8-too-narrow", "engine.precision", text, stops=True))
    tokens = config.batch.micro_batch_size * config.data.sequence_length // config.engine.parallel.sequence
    if tokens % fp8.MULTIPLE:
        text = f"a rank's micro-batch has {tokens} tokens, which fp8 needs to be a multiple of {fp8.MULTIPLE}; use another "
        text += "batch.micro_batch_size or data.sequence_length, or bf16"
        found.append(Finding("fp8-tokens", "batch.micro_batch_size", text, stops=True))
    if config.engine.compile == "none":
        text = "fp8 without compilation is slower than bf16: rounding then passes over each tensor several times; use blocks"
        found.append(Finding("fp8-not-compiled", "engine.compile", text))
    return found


def weights_findings(config: Config, data: TrainData) -> list[Finding]:
    """Finds token files whose ids mean other texts to the pretrained weights."""
    path = config.model.from_pretrained
    if not path:
        return []
    from pretrain.interop.load import tokenizer_of  # most runs need none of this

    theirs = tokenizer_of(Path(path))
    text = f"was not made with the tokenizer that {path} was trained with; correct only if it extends that tokenizer's ids"
    return [
        Finding("weights-of-another-tokenizer", f"{source.where}.path", text)
        for source in data.sources
        if theirs and source.sidecar and source.sidecar.tokenizer_fingerprint != theirs
    ]


def epoch_findings(data: TrainData, length: Length) -> list[Finding]:
    """Finds sources that the run would read more often than their max_epochs, and the longest run that would not."""
    found, block_length, total = [], data.stages[-1].cut.block_length, length.total_steps
    for i, source in enumerate(data.sources):
        if source.max_epochs is None:
            continue

        def exceeds(steps: int, number: int = i, most: float = source.max_epochs * (1 + _BLEND_ERROR)) -> bool:
            """True if the source is used up when the last of so many steps begins."""
            return data.passes(length.position_after(steps - 1))[number] > most

        if not exceeds(total):
            continue
        times, fits = data.passes(length.position)[i], bisect.bisect_left(range(1, total), True, key=exceeds)
        share = times * source.num_blocks(block_length) * block_length / length.tokens
        text = f"{source.name} would be read {times:.3g} times, and max_epochs allows {source.max_epochs:g}; at most "
        text += f"{fits:,} steps fit (train.max_steps {fits}), not {total:,}"
        if len(data.sources) > 1:
            text += f", or {share * source.max_epochs / times:.3%} of the tokens instead of {share:.3%} (weight)"
        found.append(Finding("max-epochs-exceeded", f"{source.where}.max_epochs", text, stops=True))
    return found


def pass_findings(data: TrainData, position: int) -> list[Finding]:
    """Finds sources that are read so often that nothing is left to learn from them."""
    return [
        Finding(
            "many-passes",
            source.where,
            f"{source.name} is read {times:.0f} times, and after {MOST_PASSES} passes a model memorizes it; lower its weight, "
            "train shorter or add text",
        )
        for source, times in zip(data.sources, data.passes(position), strict=True)
        if times > MOST_PASSES and source.files and source.max_epochs is None
    ]


def resume_findings(config: Config, parts: Parts, folder: Path) -> list[Finding]:
    """Checks that an existing run would resume with these settings; `folder` holds its checkpoints."""
    named = False
    try:
        found, named = resume.preview(config, folder)
        if found:
            resume.check_settings(config, parts, found)
    except ConfigError as error:
        return [Finding("resume-refused", each.key, each.message, stops=True) for each in error.problems]
    except CheckpointError as error:
        if named:
            return [Finding("resume-refused", "checkpoint.resume", str(error), stops=True)]
        return [Finding("checkpoint-damaged", str(found.path), f"{error}; the run would resume from an older one")]
    except (DataError, StoreError):  # of the mirror, which has a finding of its own
        return []
    return []
