"""Alarms: what a person should know at once, sent to a webhook while nobody watches.

The address is a secret and comes from PRETRAIN_ALARM_WEBHOOK alone. The message is JSON whose `text` Slack and Mattermost
show, and whose `content` Discord shows; ntfy takes it where the URL of a topic ends with
`?template=yes&title={{.title}}&message={{.message}}`. A thread sends: no webhook can stop or slow a run. Each cause is reported
once per start. Imports no torch.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pretrain.report.config import AlarmConfig

VARIABLE = "PRETRAIN_ALARM_WEBHOOK"
KIND_OF_STATUS = {0: "done", 70: "diverged", 75: "preempted", 76: "budget"}  # of any other exit status: stopped
POST_SECONDS = 10.0
CLOSE_SECONDS = 10.0
PAUSES_SECONDS = (2.0, 10.0, 30.0)  # between attempts
MOST_CHARACTERS = 1900  # Discord takes 2,000


def address() -> str | None:
    """The webhook, or None."""
    return os.environ.get(VARIABLE, "").strip() or None


def is_address(url: str) -> bool:
    """True if `url` can be a webhook."""
    try:
        return urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
    except ValueError:
        return False


def kind_of(status: int) -> str:
    """The kind of alarm that the end of a run with this exit status is."""
    return KIND_OF_STATUS.get(status, "stopped")


def notify(config: AlarmConfig, name: str, kind: str, text: str, step: int | None = None) -> str | None:
    """Sends one alarm of run `name` and waits for it, for programs that have no run. -> what went wrong, in words, or None."""
    url = address()
    if url is None or kind not in config.kinds:
        return None
    if not is_address(url):
        return f"{VARIABLE} is no http or https address"
    problem = post(url, message(name, kind, text, step))
    return problem and problem.removeprefix(TRY_AGAIN)


def message(name: str, kind: str, text: str, step: int | None) -> dict[str, Any]:
    """The JSON object that is sent."""
    host = socket.gethostname()
    title = f"{name}: {kind.replace('_', ' ')}"
    where = f"step {step:,}, {host}" if step else host
    words = f"{title} ({where}): {text}"[:MOST_CHARACTERS]
    facts = {"alarm": kind, "run": name, "step": step, "host": host, "time": round(time.time(), 3)}
    return {"text": words, "content": words, "title": title, "message": f"{text} ({where})"[:MOST_CHARACTERS], **facts}


# ---------------------------------------------------------------- sending


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Repeats the POST where the standard demands it; urllib would turn it into a GET, which delivers nothing and succeeds."""

    max_redirections = 3

    def redirect_request(self, request, file, code, text, headers, url):
        if code not in (307, 308):
            return None
        return urllib.request.Request(url, data=request.data, headers=dict(request.headers), method="POST")

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def post(url: str, content: dict[str, Any], seconds: float = POST_SECONDS) -> str | None:
    """Sends a message once. -> what went wrong, in words and without the address, or None; TRY_AGAIN begins what may pass."""
    opener = urllib.request.build_opener(_Redirects)
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "pretrain"}
    request = urllib.request.Request(url, data=json.dumps(content).encode(), headers=headers, method="POST")
    try:
        with opener.open(request, timeout=seconds) as answer:
            answer.read(1024)
        return None
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            return f"status {error.code}, a redirection that drops the message: use the address that it leads to"
        return f"{TRY_AGAIN if error.code >= 500 or error.code == 429 else ''}status {error.code}"
    except (OSError, ValueError) as error:  # ValueError: an address that is none
        reason = getattr(error, "reason", error)
        return f"{TRY_AGAIN}{getattr(reason, 'strerror', None) or type(reason).__name__}"


TRY_AGAIN = "not now: "


class Alarms:
    """Finds alarms in the records of a run, notices when it stalls, and sends both."""

    def __init__(
        self,
        config: AlarmConfig,
        name: str,
        skipped_steps: int | None,
        report: Callable[[str, str], None],
        info: Callable[[str], None],
    ) -> None:
        """skipped_steps: before this start, None if unknown. report: logs an alarm (kind, text) that the thread has found; `of`
        gets it back as a record."""
        self._config, self._name, self._report, self._info = config, name, report, info
        self._url = address()
        self._host = urlsplit(self._url).hostname if self._url else None
        self._known: set[tuple] = set()
        self._jobs: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._failed = False
        self._skipped = skipped_steps
        self._last = (0, time.monotonic())  # (step, when it was reached)

        self._thread = threading.Thread(target=self._run, name="alarms", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """Records progress; costs nothing."""
        self._last = (step, time.monotonic())

    def of(self, record: dict) -> tuple[str, str] | None:
        """The (kind, text) of a record that is an alarm and is news, which is sent; None otherwise."""
        found = self._find(record)
        if found is None or found[0] not in self._config.kinds or found in self._known:
            return None
        self._known.add(found)
        kind, text = found[0], str(record.get("text") or "")
        if self._url is not None:
            self._jobs.put(message(self._name, kind, text, record["step"]))
        return kind, text

    def _find(self, record: dict) -> tuple | None:
        """(kind, cause) of an alarm."""
        if "alarm" in record:
            return record["alarm"], record.get("cause") or record.get("text")
        if "slow_rank" in record:
            return "slow_rank", (record["slow_rank"], record.get("slow_host"))
        return None

    def skipped(self, record: dict) -> str | None:
        """In words, if a logging step has more skipped steps than the one before it."""
        count, before = record.get("skipped_steps"), self._skipped
        if count is None:
            return None
        self._skipped = count
        if before is None or count <= before:
            return None
        return f"{count - before} steps were skipped since the last line: loss or gradient was not finite"

    def end(self) -> None:
        """Lets the thread finish when all alarms are sent, or one attempt for each has failed."""
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._ending.set()
        self._jobs.put(None)

    def close(self) -> None:
        """Waits for the thread, until CLOSE_SECONDS after `end`."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self._info(f"alarms: {self._host} did not answer in {CLOSE_SECONDS:.0f} s; some were not delivered.")

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        limit, stalled_at = 60 * (self._config.stall_minutes or 0), -1
        while True:
            try:
                job = self._jobs.get(timeout=max(0.05, min(10.0, limit / 10)) if limit else None)
            except queue.Empty:
                step, since = self._last
                if step and step != stalled_at and time.monotonic() - since > limit:
                    stalled_at = step
                    self._report("stall", f"no step for {self._config.stall_minutes:g} minutes; the last one was step {step:,}")
                continue
            if job is None:
                return
            self._deliver(job)

    def _deliver(self, job: dict) -> None:
        for pause in (*PAUSES_SECONDS, None):
            problem = post(self._url, job, POST_SECONDS if not self._ending.is_set() else CLOSE_SECONDS / 2)
            if problem is None:
                return
            if pause is None or not problem.startswith(TRY_AGAIN) or self._ending.is_set():
                break
            self._ending.wait(pause)
        if not self._failed:  # once: the webhook stays broken until somebody mends it
            self._failed = True
            why = problem.removeprefix(TRY_AGAIN)
            kept = "metrics.jsonl and run_state.json have what it missed"
            self._info(f"alarms: {self._host} did not accept one ({why}). Check {VARIABLE}; {kept}.")
