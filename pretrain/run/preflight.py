"""What will go wrong with a run, said before it costs money: data, arithmetic, storage, and what stands in the way.

`preflight` looks at everything that needs no device, in seconds, on a login node; `at_start` is its quick part, in every run.
It knows all rooms but trains nothing. A finding has a stable name and either stops a run or warns; what is merely worth knowing
is a fact, one line. A clean configuration has no finding.
"""

from __future__ import annotations

import errno
import fcntl
import netrc
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pretrain import config as settings
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, checkpoints
from pretrain.config import Config, ConfigError, Problem, SourceConfig
from pretrain.data import checks
from pretrain.data.batches import MASKED, Batch, FileSource, TrainData, open_train, open_valid
from pretrain.data.checks import Finding
from pretrain.data.indexed import DataError, DataMissing, TokenFile
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.base import Engine
from pretrain.interop.load import tokenizer_of
from pretrain.model import config as model_settings
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.optim.schedule import lr_at
from pretrain.report.verdict import label_problem
from pretrain.run.directory import NO_LOCKS
from pretrain.run.state import began_at, count_steps, refuse_another_run

MOST_PASSES = 16  # Muennighoff et al. 2023: up to 4 passes are nearly as good as new text, after 16 nothing is left to gain
LOCK_IS_STALE_SECONDS = 600.0
NETWORK_SECONDS = 5.0
DEFAULT_PORT = 29500  # of accelerate launch and torchrun
_TOKENS_SHOWN, _CHARACTERS_SHOWN = 8, 160


@dataclass
class Report:
    """All that was found out."""

    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """Whether the run must not begin."""
        return any(finding.stops for finding in self.findings)


# ---------------------------------------------------------------- everything, and its quick part


def preflight(config: Config, ranks: int | None = None) -> Report:
    """All checks that need no device. `ranks`: processes that the run will have; null: engine.world_size, else unknown."""
    report, folder = Report(), Path(config.run.directory) / config.run.name
    report.findings += directory_findings(folder) + wandb_findings(config) + build_locks(config) + port_findings(ranks)
    report.facts += batch_facts(config, ranks)
    report.findings += batch_findings(config, ranks)
    tokenizer, found = _open_tokenizer(config)
    report.findings += found
    vocab_size, data_ids = model_settings.vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    if vocab_size is None:
        return report
    report.findings += _file_findings(config, tokenizer, data_ids, report.facts)
    opened = dict(seed=config.run.seed, vocab_size=data_ids, tokenizer_fingerprint=tokenizer and tokenizer.fingerprint)
    try:
        data = open_train(config.data, **opened)
        open_valid(config.data, **opened)
    except DataError as error:
        if not report.stops:
            report.findings.append(Finding("data-refused", "data", str(error), stops=True))
        return report
    model = model_settings.resolve_model(config.model, vocab_size=vocab_size, sequence_length=config.data.sequence_length)
    batch = data.take(0, min(4, config.batch.global_batch_size))
    report.facts += batch_in_words(batch, tokenizer)
    report.findings += first_batch_findings(batch, tokenizer)
    try:
        steps = count_steps(config, data)
    except ConfigError as error:
        report.findings += [Finding("schedule-too-long", each.key, each.message, stops=True) for each in error.problems]
        return report
    report.facts += run_facts(config, model, data, steps)
    report.findings += weights_findings(config, data)
    report.findings += schedule_findings(config, steps) + pass_findings(config, data, steps)
    report.findings += storage_findings(config, model, folder, steps)
    report.findings += resume_findings(config, model, data, folder)
    return report


def at_start(config: Config, engine: Engine, model: ModelConfig, data: TrainData, valid: list) -> list[Finding]:
    """The quick part, before the model is built; rank 0 looks, all ranks agree. A collective. -> warnings, on rank 0.

    Raises ConfigError for what stops a run. A disk that is too small only warns here: a run that goes on may have freed some.
    """
    found: list[Finding] = []
    steps = count_steps(config, data)  # raises on all ranks, if on one
    if engine.rank == 0:
        folder = Path(config.run.directory) / config.run.name
        files = [(f"data.train[{i}].path", source) for i, source in enumerate(data.sources)]
        files += [(f"data.valid[{i}].path", each.source) for i, each in enumerate(valid)]
        if not config.data.synthetic:
            found += _same_files([source.file for source in data.sources], [each.source.file for each in valid])
        for where, source in files:
            if isinstance(source, FileSource):
                found += checks.sampled(source.file, where, vocab_size=data.vocab_size, end_of_document_id=None)
                found += checks.entropies(source.file, where, data.vocab_size) if source.seal else []
        found += build_locks(config) + schedule_findings(config, steps) + pass_findings(config, data, steps)
        found += weights_findings(config, data)
        found += [each._replace(stops=False) for each in storage_findings(config, model, folder, steps)]
    stops = [each for each in found if each.stops]
    if engine.broadcast(len(stops)):
        problems = [Problem(each.name, each.text, each.where) for each in stops]
        raise ConfigError(problems or [Problem("preflight", "rank 0 has found what stops this run")])
    return found


# ---------------------------------------------------------------- data


def _open_tokenizer(config: Config) -> tuple[Tokenizer | None, list[Finding]]:
    if config.tokenizer.path is None:
        return None, []
    try:
        return Tokenizer.load(config.tokenizer.path), []
    except DataError as error:
        name = "tokenizer-damaged" if any(Path(config.tokenizer.path).glob("tokenizer*")) else "tokenizer-missing"
        return None, [Finding(name, "tokenizer.path", str(error), stops=True)]


def _file_findings(config: Config, tokenizer: Tokenizer | None, vocab_size: int, facts: list[str]) -> list[Finding]:
    """Of all token files, one by one and against each other."""
    found: list[Finding] = []
    files: dict[str, list[TokenFile]] = {"train": [], "valid": []}
    end = tokenizer.end_of_document_id if tokenizer else None
    for key, sources in (("train", config.data.train), ("valid", config.data.valid)):
        for i, source in enumerate(sources):
            where = f"data.{key}[{i}].path"
            file, problems = _open_file(source, where)
            found += problems
            if file is None:
                continue
            files[key].append(file)
            facts += file_facts(file, end)
            found += checks.unfit(
                file,
                where,
                config.data,
                vocab_size=vocab_size,
                tokenizer_fingerprint=tokenizer and tokenizer.fingerprint,
                least_tokens=config.data.sequence_length + 1 if key == "train" else 2,
            )
            found += checks.sampled(file, where, vocab_size=vocab_size, end_of_document_id=end)
            found += checks.entropies(file, where, vocab_size) + checks.checksums(file, where)
            if file.seal is None and tokenizer:
                text = f"{file.path} has no seal, so nothing says which tokenizer made it; tools/tokenize_corpus.py writes one"
                found.append(Finding("no-seal", where, text))
    return found + _copy_findings(files["train"], files["valid"], end, facts)


def _open_file(source: SourceConfig, where: str) -> tuple[TokenFile | None, list[Finding]]:
    try:
        return TokenFile(source.path), []
    except DataMissing as error:
        return None, [Finding("data-missing", where, str(error), stops=True)]
    except (DataError, OSError) as error:
        return None, [Finding("data-damaged", where, str(error), stops=True)]


def file_facts(file: TokenFile, end: int | None) -> list[str]:
    """What is in a token file, in two or three lines."""
    documents = f" in {file.num_documents:,} documents" if file.num_documents else ", without a document index"
    tokens, seal = file.sample(), file.seal
    line = f"{file.path}: {file.num_tokens:,} tokens ({file.dtype.name}){documents}, ids up to {tokens.max():,} in a sample"
    sealed = f", {seal.max_id:,} in the seal; {seal.utf8_bytes / seal.num_tokens:.2f} bytes of text per token" if seal else ""
    lines = [line + sealed]
    end = seal.end_of_document_id if seal else end
    if end is not None:
        count = int((tokens == end).sum())
        often = f"one in {len(tokens) / count:,.0f} tokens" if count else "never"
        lines.append(f"  end-of-document id {end}: {often} in a sample")
    if file.num_documents:
        lines.append(f"  tokens per document, quantiles: {checks.length_quantiles(file)}")
    return lines


def _copy_findings(train: list[TokenFile], valid: list[TokenFile], end: int | None, facts: list[str]) -> list[Finding]:
    shares = checks.copies(train, valid, end) if train else None
    if shares is None:  # nothing says where documents end
        return _same_files(train, valid)
    extent = "all" if shares.whole else "a sample of"
    facts.append(
        f"copies: {shares.train:.2%} of the training tokens stand in second copies of documents"
        + (f", {shares.valid:.2%} of the validation tokens in documents of the training data" if valid else "")
        + f" ({extent} {shares.documents:,} documents)"
    )
    found = []
    if shares.train > 0.1:
        text = f"{shares.train:.0%} of the tokens stand in second copies of documents, which are learned by heart; remove them"
        found.append(Finding("duplicate-documents", "data.train", text))
    if shares.valid > 0.01:
        text = f"{shares.valid:.0%} of the validation tokens are training documents, so the validation loss will look too good"
        found.append(Finding("validation-overlap", "data.valid", f"{text}; split by document with tools/tokenize_corpus.py"))
    return found


def _same_files(train: list[TokenFile], valid: list[TokenFile]) -> list[Finding]:
    known = {file.fingerprint() for file in train}
    text = "is a file of data.train, too, so the validation loss will look too good; give it text of its own"
    same = [file.path for file in valid if file.fingerprint() in known]
    return [Finding("validation-overlap", "data.valid", f"{path} {text}") for path in same]


def batch_in_words(batch: Batch, tokenizer: Tokenizer | None) -> list[str]:
    """The first sample, and its first inputs beside their labels."""
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
    """Whether the labels are the next tokens, and the ids are text for this tokenizer."""
    found = []
    if not bool((batch.labels_BT != MASKED).any()):
        found.append(Finding("labels-all-masked", "data", "no label of the first batch counts: nothing can be learned", True))
    elif problem := label_problem(batch.tokens_BT.numpy(), batch.labels_BT.numpy()):
        found.append(Finding("labels-wrong", "data", f"in the first batch {problem}", stops=True))
    if tokenizer:
        # A window may begin and end within a character: what is broken there does not count.
        texts = [tokenizer.decode(row).strip("\ufffd") for row in batch.tokens_BT.tolist()]
        broken, length = sum(text.count("\ufffd") for text in texts), sum(map(len, texts))
        if broken > 0.05 * max(1, length):
            share = f"{broken / max(1, length):.0%} of the decoded characters of the first batch are no valid text"
            found.append(Finding("text-garbled", "tokenizer.path", f"{share}: is it the tokenizer that made the data?"))
    return found


# ---------------------------------------------------------------- arithmetic


def batch_facts(config: Config, ranks: int | None) -> list[str]:
    """The global batch as a product."""
    batch, length = config.batch, config.data.sequence_length
    tokens = f"times {length:,} tokens = {batch.global_batch_size * length:,} tokens a step"
    ranks = ranks or config.engine.world_size
    groups = batch.global_batch_size // batch.micro_batch_size
    if ranks:
        product = f"ranks {ranks} x micro-batch {batch.micro_batch_size} x accumulation {settings.accumulation(batch, ranks)}"
        return [f"batch: {batch.global_batch_size} sequences a step = {product}; {tokens}"]
    fitting = ", ".join(str(n) for n in range(1, min(groups, 4096) + 1) if groups % n == 0)
    return [f"batch: {batch.global_batch_size} sequences a step; {tokens}. Numbers of ranks that fit: {fitting or 'none'}"]


def batch_findings(config: Config, ranks: int | None) -> list[Finding]:
    """Settings that do not fit the number of ranks."""
    problems = settings.validate(config, ranks or config.engine.world_size or 1)
    return [Finding("batch-arithmetic", problem.key, problem.message, stops=True) for problem in problems]


def run_facts(config: Config, model: ModelConfig, data: TrainData, steps: int) -> list[str]:
    """Length, learning rates as the engine will be given them, and how often each source is read."""
    schedule, peak, samples = config.schedule, config.optimizer.lr, steps * config.batch.global_batch_size
    total, tokens = flops.num_parameters(model).total, samples * config.data.sequence_length
    places = {"step 1": 1, "end of warm-up": max(1, schedule.warmup_steps), "middle": max(1, steps // 2), "last": steps}
    rates = ", ".join(f"{name} ({at:,}) {lr_at(at, schedule, peak, steps):.3g}" for name, at in places.items())
    lines = [
        f"model: {total:,} parameters, vocabulary {model.vocab_size:,}",
        f"length: {steps:,} steps = {tokens:,} tokens = {tokens / total:.3g} tokens per parameter",
        f"learning rate ({schedule.name}), set by hand before each update: {rates}",
    ]
    passes = zip(data.sources, data.passes(samples), strict=True)
    return lines + [f"{source.name}: read {times:.3g} times" for source, times in passes]


def schedule_findings(config: Config, steps: int) -> list[Finding]:
    """Learning rates that cannot be meant."""
    schedule, peak, found = config.schedule, config.optimizer.lr, []
    if not 1e-7 <= peak <= 0.1:
        text = f"peak {peak:.3g}; what trains is between 1e-5 and 1e-2 for nearly every model"
        found.append(Finding("lr-out-of-range", "optimizer.lr", text))
    if schedule.warmup_steps > 0.5 * steps:
        text = f"{schedule.warmup_steps:,} of {steps:,} steps are warm-up; 1 to 10 % is usual"
        found.append(Finding("warmup-too-long", "schedule.warmup_steps", text))
    end = schedule.warmup_steps + (schedule.decay_steps or steps)
    if schedule.name in ("cosine", "linear") and end < 0.9 * steps:
        text = f"the decay ends at step {end:,} of {steps:,}, and the rate stays at its lowest from there; null reaches the end"
        found.append(Finding("lr-ends-early", "schedule.decay_steps", text))
    return found


def weights_findings(config: Config, data: TrainData) -> list[Finding]:
    """Trained weights to which the ids of the tokens mean other texts."""
    path = config.model.from_pretrained
    theirs = tokenizer_of(Path(path)) if path else None
    text = f"made with another tokenizer than {path} was trained with; right only where it has the same ids and more"
    return [
        Finding("weights-of-another-tokenizer", f"data.train[{i}].path", text)
        for i, source in enumerate(data.sources)
        if theirs and isinstance(source, FileSource) and source.seal and source.seal.tokenizer_fingerprint != theirs
    ]


def pass_findings(config: Config, data: TrainData, steps: int) -> list[Finding]:
    """Sources that are read so often that nothing is left to learn from them."""
    samples = steps * config.batch.global_batch_size
    return [
        Finding(
            "many-passes",
            f"data.train[{i}]",
            f"{source.name} is read {times:.0f} times, and after {MOST_PASSES} a model learns it by heart; lower its weight, "
            "train shorter or add text",
        )
        for i, (source, times) in enumerate(zip(data.sources, data.passes(samples), strict=True))
        if times > MOST_PASSES and isinstance(source, FileSource)
    ]


# ---------------------------------------------------------------- storage and surroundings


def directory_findings(folder: Path) -> list[Finding]:
    """Whether the run's folder can be made, written, and is free."""
    found = []
    if (folder / "STOP").exists():
        found.append(Finding("stop-file", str(folder / "STOP"), "is there: the run would end at once; remove it", stops=True))
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(folder)) as file:
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror or error}); choose another"
        return [*found, Finding("directory-not-writable", "run.directory", text, stops=True)]
    try:
        with open(folder / "run.lock", "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = (folder / "run.lock").read_text(errors="replace").strip()
        text = f"is in use by {holder}; stop it or choose another run.name"
        found.append(Finding("run-locked", str(folder), text, stops=True))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            text = f"run.lock cannot be locked here ({error.strerror}): see to it that no second job uses the folder"
            found.append(Finding("run-locked", str(folder), text, stops=error.errno not in NO_LOCKS))
    return found


def _existing(folder: Path) -> Path:
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())


def storage_findings(config: Config, model: ModelConfig, folder: Path, steps: int) -> list[Finding]:
    """Whether all checkpoints that are kept at a time, and the one in writing, fit on the disk."""
    each, needed = checkpoint_bytes(config, model, steps)
    there = sum(file.stat().st_size for file in (folder / "checkpoints").glob("step_*/*") if file.is_file())
    free = shutil.disk_usage(_existing(folder)).free
    if needed <= free + there:
        return []
    text = f"checkpoints will take {needed / 2**30:,.1f} GiB ({needed // each} of {each / 2**30:,.2f} GiB), and "
    text += f"{free / 2**30:,.1f} GiB are free; keep fewer (checkpoint.keep_last, keep_best) or choose another run.directory"
    return [Finding("disk-too-small", "run.directory", text, stops=True)]


def checkpoint_bytes(config: Config, model: ModelConfig, steps: int) -> tuple[int, int]:
    """(bytes of one, bytes of all that exist at a time): fp32 weights and moments, and one more while it is written."""
    estimate, every = flops.bytes_estimate(model), config.checkpoint.every_steps
    each = estimate.parameters + estimate.moments
    made = 1 + (steps - 1) // every if every else 2**31 if config.checkpoint.every_minutes else 1
    return each, each * min(made, config.checkpoint.keep_last + config.checkpoint.keep_best + 1)


def resume_findings(config: Config, model: ModelConfig, data: TrainData, folder: Path) -> list[Finding]:
    """Whether a run that exists would go on with these settings."""
    there, wish = checkpoints(folder / "checkpoints"), config.checkpoint.resume
    named = wish not in ("auto", "never") and not began_at(folder / "checkpoints", wish)
    if named:
        there = [Checkpoint(Path(wish).resolve())]
    if not there:
        return []
    if wish == "never":
        text = f"is never, but {folder} has checkpoints; use auto, or another run.name"
        return [Finding("resume-refused", "checkpoint.resume", text, stops=True)]
    try:
        refuse_another_run(config, model, data, there[0].state(), there[0])
    except ConfigError as error:
        return [Finding("resume-refused", each.key, each.message, stops=True) for each in error.problems]
    except CheckpointError as error:
        if named:
            return [Finding("resume-refused", "checkpoint.resume", str(error), stops=True)]
        return [Finding("checkpoint-damaged", str(there[0].path), f"{error}; the run would go on from an older one")]
    return []


def build_locks(config: Config) -> list[Finding]:
    """Locks that a killed build of DeepSpeed's extensions left behind: every later start would wait for them without a word."""
    if not config.engine.name.startswith("zero"):
        return []
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    found = []
    for lock in [*Path(home).glob("*/lock"), *Path(home).glob("*/*/lock")]:
        age = time.time() - lock.stat().st_mtime
        if stale := age > LOCK_IS_STALE_SECONDS:
            text = f"is {age / 60:.0f} minutes old: the build that made it is dead, and every start waits for it; remove it"
        else:
            text = "is new: an extension is being built. Wait for it, or remove the lock if no build is at work"
        found.append(Finding("build-lock", str(lock), text, stops=stale))
    return found


def port_findings(ranks: int | None) -> list[Finding]:
    """Whether the port where ranks meet is free on this machine."""
    port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    if ranks == 1 or port == 0:
        return []
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return []
    text = f"port {port} is in use on this machine; set MASTER_PORT (torchrun) or --main_process_port 0 (accelerate launch)"
    return [Finding("port-in-use", "MASTER_PORT", text, stops="MASTER_PORT" in os.environ)]


def wandb_findings(config: Config) -> list[Finding]:
    """Whether W&B will have the records at once; without, they go to files, for `wandb sync` later."""
    if "wandb" not in config.log.sinks or os.environ.get("WANDB_MODE", config.log.wandb.mode) != "online":
        return []
    later = "its records would go to files, for `wandb sync` later"
    found = []
    address = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _is_in_netrc(host)):
        found.append(Finding("wandb-no-key", "log.wandb", f"no API key: set WANDB_API_KEY or run `wandb login`; {later}"))
    try:
        socket.create_connection((host, port), NETWORK_SECONDS).close()
    except OSError as error:
        found.append(Finding("wandb-unreachable", "log.wandb", f"{host}:{port} cannot be reached ({error}); {later}"))
    return found


def _is_in_netrc(host: str) -> bool:
    """Whether `wandb login` has been here."""
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        try:
            if path and netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
