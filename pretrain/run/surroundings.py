"""Problems of a machine found before a run costs money: its directory and disk, locks, ports, and the sinks of the records."""

from __future__ import annotations

import errno
import fcntl
import importlib
import netrc
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from pretrain.config import Config
from pretrain.data.checks import Finding
from pretrain.model.config import ModelConfig
from pretrain.plan import cost
from pretrain.report import alarms
from pretrain.run.directory import NO_LOCKS

LOCK_IS_STALE_SECONDS = 600.0
NETWORK_SECONDS = 5.0
DEFAULT_PORT = 29500  # of accelerate launch and torchrun
_TRACKERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "trackio": "trackio"}
PACKAGES = {"mlflow": "mlflow-skinny"}  # the client without its server
_NOT_IN_WANDB_IDS = ":;,#?/'"


def directory_findings(folder: Path) -> list[Finding]:
    """Checks that the run's directory can be created, written and locked."""
    found = []
    if (folder / "STOP").exists():
        found.append(Finding("stop-file", str(folder / "STOP"), "exists, so the run would not start; remove it", stops=True))
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
            text = f"run.lock cannot be locked here ({error.strerror}): make sure that no second job uses the directory"
            found.append(Finding("run-locked", str(folder), text, stops=error.errno not in NO_LOCKS))
    return found


def _existing(folder: Path) -> Path:
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())


def storage_findings(config: Config, model: ModelConfig, folder: Path, steps: int) -> list[Finding]:
    """Checks that the disk has room for all checkpoints kept at a time and the one being written."""
    each, needed = checkpoint_bytes(config, model, steps)
    there = sum(file.stat().st_size for file in (folder / "checkpoints").glob("step_*/*") if file.is_file())
    free = shutil.disk_usage(_existing(folder)).free
    if needed <= free + there:
        return []
    text = f"checkpoints will take {needed / 2**30:,.1f} GiB ({needed // each} of {each / 2**30:,.2f} GiB), and "
    text += f"{free / 2**30:,.1f} GiB are free; keep fewer (checkpoint.keep_last, keep_best) or choose another run.directory"
    return [Finding("disk-too-small", "run.directory", text, stops=True)]


def checkpoint_bytes(config: Config, model: ModelConfig, steps: int) -> tuple[int, int]:
    """(bytes of one, bytes of all that exist at a time): fp32 weights and moments, and one more while it is being written."""
    every, optimizer = config.checkpoint.every_steps, config.optimizer
    each = cost.checkpoint_bytes(model, optimizer.name, optimizer.averages)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + bool(config.checkpoint.mirror)  # one waits for it
    made = 1 + (steps - 1) // every if every else 2**31 if config.checkpoint.every_minutes else 1
    return each, each * min(made, kept + 1)


def build_locks(config: Config) -> list[Finding]:
    """Finds locks that a killed build of DeepSpeed's extensions left behind: every later start would wait for them silently."""
    if not config.engine.name.startswith("zero"):
        return []
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))
    found = []
    for lock in [*home.glob("*/lock"), *home.glob("*/*/lock")]:
        age = time.time() - lock.stat().st_mtime
        if stale := age > LOCK_IS_STALE_SECONDS:
            text = f"is {age / 60:.0f} minutes old: its build was killed, and every start waits for it; remove it"
        else:
            text = "is new: an extension is being built. Wait for it, or remove the lock if no build is running"
        found.append(Finding("build-lock", str(lock), text, stops=stale))
    return found


def port_findings(ranks: int | None) -> list[Finding]:
    """Checks that the port where ranks meet is free on this machine."""
    text = os.environ.get("MASTER_PORT", str(DEFAULT_PORT))
    if not text.isdecimal() or int(text) >= 2**16:
        return [Finding("port-in-use", "MASTER_PORT", f"got {text!r}, must be a number from 1 to 65535", stops=True)]
    port = int(text)
    if ranks == 1 or port == 0:
        return []
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return []
    text = f"port {port} is in use on this machine; set MASTER_PORT (torchrun) or --main_process_port 0 (accelerate launch)"
    return [Finding("port-in-use", "MASTER_PORT", text, stops="MASTER_PORT" in os.environ)]


def sink_findings(config: Config) -> list[Finding]:
    """Finds trackers in log.sinks that would show nothing of the run: their package is missing, or W&B refuses the id."""
    found = []
    wandb_id = os.environ.get("WANDB_RUN_ID", "")
    named_by_it = {"wandb", "mlflow", "trackio"} & set(config.log.sinks)
    if named_by_it and (wandb_id != wandb_id.strip() or set(wandb_id) & set(_NOT_IN_WANDB_IDS)):
        text = f"got {wandb_id!r}, but W&B allows none of {_NOT_IN_WANDB_IDS} and no spaces at the ends; change or unset it"
        found.append(Finding("wandb-id", "WANDB_RUN_ID", text, stops=True))
    for sink, module in _TRACKERS.items():
        if sink in config.log.sinks:
            try:
                importlib.import_module(module)
            except Exception as error:  # of broken packages, anything
                package = PACKAGES.get(sink, sink)
                text = (
                    f"{sink} cannot be imported ({type(error).__name__}: {error}); install it with pip install {package}, or "
                )
                found.append(Finding("sink-missing", "log.sinks", f"{text}remove {sink} from log.sinks", stops=True))
    if (webhook := alarms.address()) and not alarms.is_address(webhook):
        found.append(Finding("alarm-webhook", alarms.VARIABLE, "is no http or https address; change or unset it", stops=True))
    if "mlflow" in config.log.sinks and not (config.log.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        text = "is null and so is MLFLOW_TRACKING_URI; set one of them, such as http://localhost:5000"
        found.append(Finding("mlflow-address", "log.mlflow.tracking_uri", text, stops=True))
    return found


def wandb_findings(config: Config) -> list[Finding]:
    """Checks that W&B can receive records now; otherwise they go to files, for `wandb sync` later."""
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
    """True if `wandb login` has stored a key for this host."""
    for path in (os.environ.get("NETRC"), os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")):
        try:
            if path and netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
