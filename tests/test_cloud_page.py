"""docs/cloud.md works: a new user's commands run in order on a small model, with a real S3 server in place of the cloud's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.s3 import s3_server, upload
from tests.test_docs import ROOT, fences

PAGE = ROOT / "docs" / "cloud.md"
NEEDS_A_CLOUD = "<!-- needs a cloud -->"
CLOUD_PROGRAMS = ("aws", "hf", "docker", "sky", "sbatch", "tail", "kubectl", "python3")
SMALL = {
    "data": {"sequence_length": 64},
    "model": {"vocab_size": None, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 64},
    "batch": {"global_batch_size": 8, "micro_batch_size": 1},
    "schedule": {"warmup_steps": 2},
    "train": {"max_tokens": 64 * 8 * 20},
    "engine": {"precision": "fp32", "compile": "none"},
    "evaluate": {"every_steps": 10, "max_batches": 2},
}  # fmt: skip


def blocks() -> list[tuple[bool, str]]:
    """(needs a cloud?, text) of each block of shell commands, in order."""
    found = re.findall(rf"^({NEEDS_A_CLOUD}\n)?```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == len(fences(PAGE, "bash"))
    return [(bool(mark), text) for mark, text in found]


def test_only_commands_of_a_cloud_are_marked_as_needing_one():
    for marked, text in blocks():
        for line in text.replace("\\\n", " ").splitlines():
            program = line.split()[0]
            assert (program in CLOUD_PROGRAMS) == marked, line


@pytest.mark.slow
def test_the_plan_and_the_costs_on_the_page_are_what_the_tool_says(tmp_path):
    (line,) = (line for line in blocks()[0][1].splitlines() if "plan_run" in line)
    command = [sys.executable, *line.split()[1:], "--json", tmp_path / "plan.json"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    (shown,) = fences(PAGE, "console")
    assert said[said.index("speed  ") :].strip() == shown.strip()
    plan = json.loads((tmp_path / "plan.json").read_text())
    spot = next(each for each in plan["choices"] if each["market"] == "spot" and each["gpus"] == 8)
    paid = re.findall(r"^\| GPUs.*\| ([\d.]+) GPU-hours.*\$([\d.]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [(float(hours), float(cost)) for hours, cost in paid] == [
        (round(each["gpu_hours"], 1), round(each["dollars"], 2)) for each in (plan["configuration"], spot)
    ]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder like the project's, with a small model in configs/cloud.yaml, and raw text."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    for name in ("launch", "tools", "pretrain", "docs"):
        (folder / name).symlink_to(ROOT / name)
    settings = yaml.safe_load((ROOT / "configs" / "cloud.yaml").read_text())
    for section, keys in SMALL.items():
        settings[section] = settings[section] | keys
    (folder / "configs" / "cloud.yaml").write_text(yaml.safe_dump(settings))
    (mine,) = fences(PAGE, "yaml")
    (folder / "mine.yaml").write_text(mine.replace("my-bucket", "corpus"))
    raw = folder / "raw" / "sample" / "10BT"
    raw.mkdir(parents=True)
    for file in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]:  # of Python's standard library
        (raw / f"{file.stem}.txt").write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_lead_to_a_trained_model(project):
    """Two marked blocks matter here: the text is downloaded (by the fixture), the token files are uploaded."""
    pytest.importorskip("transformers")
    runs = [text for marked, text in blocks() if not marked]
    script = "\n".join(["set -ex", *runs]).replace("make install && . .venv/bin/activate", "true")
    script = re.sub(r"^python tools/plan_run.*$", "true", script, flags=re.MULTILINE)  # tested above
    script = script.replace("--vocab-size 32000", "--vocab-size 400").replace("--valid-fraction 0.001", "--valid-fraction 0.1")
    head, marker, rest = script.partition("python tools/check_run.py")
    with s3_server():
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(project / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        for part in (head, f"set -ex\n{marker}{rest}"):
            done = subprocess.run(
                ["bash", "-c", part], cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert done.returncode == 0, done.stdout
            if part is head:
                upload(project / "data" / "cloud" / "tokenizer", "s3://corpus/data/tokenizer")
                files = [file for file in (project / "data" / "cloud").iterdir() if file.is_file()]
                (project / "upload").mkdir()
                for file in files:
                    (project / "upload" / file.name).symlink_to(file)
                upload(project / "upload", "s3://corpus/data")
    run = project / "runs" / "first-1b"
    state = json.loads((run / "run_state.json").read_text())
    assert (state["status"], state["saved_step"]) == ("done", 20)
    assert f"cat runs/{run.name}/invoice.txt" in script and "start " in done.stdout
    assert done.stdout.count("the run ended with status 0") == 2  # the second one only after the folder was lost
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line][-1] == 20
    assert (project / "first-1b-hf" / "config.json").exists()
