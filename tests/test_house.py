"""The rules of CONTRIBUTING.md, checked by reading the code: imports, sizes, names, safety, documents, and the image."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "pretrain").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("launch", "tools", "benchmarks") for path in (ROOT / folder).glob("*.py"))
ROOMS = sorted(path.name for path in (ROOT / "pretrain").iterdir() if (path / "__init__.py").exists())
SETTINGS = {
    "pretrain",
    "pretrain.devices",
    "pretrain.files",
    "pretrain.schema",
    "pretrain.target",
    "pretrain.config",
    "pretrain.stages",
    "pretrain.data.config",
    "pretrain.model.config",
    "pretrain.model.hf_mapping",
    "pretrain.engines.config",
    "pretrain.checkpoint.config",
    "pretrain.report.config",
}
"""The leaf modules and the settings: every room but the doctor may import them, and takes only its own section."""
ROOMS_BELOW = {
    "doctor": set(),
    "data": set(),
    "model": set(),
    "optim": set(),
    "engines": {"model"},
    "plan": {"data", "model", "optim", "engines"},
    "checkpoint": {"engines"},
    "report": {"doctor"},
    "interop": {"data", "model", "engines", "checkpoint", "report"},
    "run": {"doctor", "data", "model", "optim", "engines", "plan", "checkpoint", "report", "interop"},
}
"""Room -> the rooms that it may import."""
TAKES_ALL_SETTINGS = {"interop", "run"}
WITHOUT_TORCH = [
    "pretrain.config",
    "pretrain.devices",
    "pretrain.model.hf_mapping",
    "pretrain.schema",
    "pretrain.doctor.compare_runs",
    "pretrain.optim.schedule",
    "pretrain.engines.config",
    "pretrain.engines.machines",
    "pretrain.engines.place",
    "pretrain.run.team",
    "pretrain.data.order",
    "pretrain.data.sources",
    "pretrain.data.indexed",
    "pretrain.data.arrow",
    "pretrain.data.interchange",
    "pretrain.data.corpus",
    "pretrain.data.tokenizer",
    "pretrain.data.checks",
    "pretrain.data.excluded",
    "pretrain.model.flops",
    "pretrain.plan.summary",
    "pretrain.report.plan_table",
    "pretrain.report.sinks",
    "pretrain.report.plot",
    "pretrain.doctor.verdict",
    "pretrain.doctor.untrained",
    "pretrain.report.environment",
    "pretrain.doctor.findings",
    "pretrain.run.page",
    "pretrain.run.screen",
    "pretrain.run.view",
    "pretrain.checkpoint.manifest",
    "pretrain.checkpoint.tensors",
]
MAX_FUNCTION_LINES, MAX_FILE_LINES = 100, 550


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of every import in a file, anywhere in it; relative ones made absolute."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names]
            submodules = [each for each in names if (ROOT / module.replace(".", "/") / f"{each}.py").exists()]
            yield from ((f"{module}.{each}", []) for each in submodules)
            if len(names) > len(submodules):
                yield module, [each for each in names if each not in submodules]


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.parent.name in ROOMS], ids=name)
def test_a_room_imports_only_rooms_below_it_and_its_own_section_of_the_settings(path):
    room = path.parent.name
    allowed = tuple(f"pretrain.{each}." for each in {room, *ROOMS_BELOW[room]})
    for module, names in imports(path):
        if module.split(".")[0] == "pretrain":
            settings = {"pretrain", "pretrain.files"} if room == "doctor" else SETTINGS
            assert module in settings or module.startswith(allowed), f"{name(path)} imports {module}"
            if room not in TAKES_ALL_SETTINGS:
                assert "Config" not in names, f"{name(path)} takes the entire Config; let it take its own section"
        if room == "data":
            assert not module.startswith("torch.distributed"), f"{name(path)} imports {module}"


def test_settings_import_no_room_and_nothing_imports_scripts():
    for path in PACKAGE:
        for module, _ in imports(path):
            assert module.split(".")[0] not in ("launch", "tools", "tests", "benchmarks"), f"{name(path)} imports {module}"
            if module_of(path) in SETTINGS and module.startswith("pretrain"):
                assert module in SETTINGS, f"{name(path)} imports {module}"


def test_there_are_no_import_cycles():
    known = {module_of(path): path for path in PACKAGE}
    below = {module: {each for each, _ in imports(path) if each in known} for module, path in known.items()}
    while leaves := {module for module, imported in below.items() if not imported & below.keys()}:
        below = {module: imported for module, imported in below.items() if module not in leaves}
    assert not below, f"in cycles, or above them: {sorted(below)}"


def test_modules_that_need_no_torch_do_not_import_it_even_indirectly():
    code = "import sys\nfor each in sys.argv[1:]:\n    __import__(each)\n    if 'torch' in sys.modules: sys.exit(each)"
    done = subprocess.run([sys.executable, "-c", code, *WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"torch is imported by {done.stderr}"


def test_a_wrong_setting_is_refused_before_torch_is_imported():
    code = (
        "import runpy, sys\nsys.argv = ['launch/pretrain.py', '--optimizer.lr', 'fast']\n"
        "try:\n    runpy.run_path('launch/pretrain.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 2, end.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "optimizer.lr" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_no_script_has_the_name_of_a_library_and_each_imports_the_package_from_any_folder(path):
    libraries = sys.stdlib_module_names | {canonicalize_name(each.name) for each in requirements()}
    assert path.stem not in libraries, f"{name(path)} would hide the library {path.stem} from every script beside it"
    source = path.read_text()
    first = re.search(r"^(from|import) pretrain\b", source, re.MULTILINE)
    if first and "__main__" in source:
        before = source[: first.start()]
        assert "sys.path[0] = str(Path(__file__).resolve().parents[1])" in before, (
            f"{name(path)} must set sys.path[0] before it imports pretrain"
        )


# ---------------------------------------------------------------- sizes, words, safety


@pytest.mark.parametrize("path", PACKAGE + SCRIPTS, ids=name)
def test_files_and_functions_are_short_and_public_names_are_documented(path):
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{name(path)} has {lines} lines"
    module = tree(path)
    assert not module.body or ast.get_docstring(module), f"{name(path)} has no docstring"
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{name(path)}:{node.lineno} {node.name} has {length} lines"
    if path in PACKAGE:
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name(path)}:{node.lineno} {node.name} has no docstring"


def dangers(source: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, construct) for everything that could execute code from a data file."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (
                (node.lineno, f"import {each}")
                for each in modules
                if each.split(".")[0] in ("pickle", "dill", "marshal", "shelve")
            )
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
                yield node.lineno, called
            if called == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                yield node.lineno, "torch.load without weights_only=True"
            wanted = {"weights_only": False, "trust_remote_code": True, "shell": True}
            for keyword in node.keywords:
                if keyword.arg in wanted and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is not wanted[keyword.arg]
                ):
                    yield node.lineno, ast.unparse(keyword)


@pytest.mark.parametrize("path", PACKAGE + SCRIPTS, ids=name)
def test_nothing_executes_code_from_data_files_and_no_todo_is_left(path):
    assert not list(dangers(tree(path))), name(path)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line), f"{name(path)}:{number}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "f(trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_each_danger_is_recognized(code):
    assert list(dangers(ast.parse(code)))
    assert not list(dangers(ast.parse("model.eval(); torch.load(path, weights_only=True); subprocess.run(words)")))


# ---------------------------------------------------------------- dependencies


def requirements() -> list[Requirement]:
    """The requirements in setup.py, including all extras."""
    given: dict = {}
    real, setuptools.setup = setuptools.setup, lambda **settings: given.update(settings)
    folder = os.getcwd()
    try:
        os.chdir(ROOT)
        runpy.run_path("setup.py")
    finally:
        setuptools.setup = real
        os.chdir(folder)
    return [
        Requirement(each)
        for each in [*given["install_requires"], *(r for extra in given["extras_require"].values() for r in extra)]
    ]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_direct_dependency_is_pinned_once_for_every_python(python):
    required = {canonicalize_name(each.name): each for each in requirements()}
    pinned = [each for each in constraints() if not each.marker or each.marker.evaluate({"python_version": python})]
    names = [canonicalize_name(each.name) for each in pinned]
    assert sorted(names) == sorted(required)
    for each in pinned:
        (version,) = each.specifier
        assert version.operator == "=="
        assert required[canonicalize_name(each.name)].specifier.contains(version.version), (
            f"{each} is outside what setup.py allows"
        )


NOT_IN_ALL = {
    "lm-eval",
    "mlflow-skinny",
    "trackio",
    "sqlalchemy",
    "alembic",
}  # dozens of libraries; make test-slow installs them


def test_the_installed_versions_are_the_pinned_ones():
    for each in constraints():
        if not each.marker or each.marker.evaluate():
            try:
                installed = metadata.version(each.name)
            except metadata.PackageNotFoundError:
                assert each.name in NOT_IN_ALL, f"{each.name} is not installed: make install"
                continue
            assert each.specifier.contains(installed), f"{each.name} {installed} is installed, {each} is pinned: make install"


def test_every_imported_library_is_a_requirement():
    distributions = metadata.packages_distributions()
    required = {canonicalize_name(each.name) for each in requirements()} | {"setuptools", "packaging"}
    ours = {"pretrain", "tests", "launch", "tools", "benchmarks"}
    for path in [*PACKAGE, *SCRIPTS, *(ROOT / "tests").rglob("*.py")]:
        for module, _ in imports(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ours or not top:
                continue
            if path.name == "peer_programs.py" and top == "litgpt":  # peers.py installs it into an environment of its own
                continue
            unknown = {"mlflow": "mlflow-skinny"}.get(top, top)  # where it is not installed
            providers = {canonicalize_name(each) for each in distributions.get(top, [unknown])}
            assert providers & required, f"{name(path)} imports {top}, which setup.py does not list"


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=name)
def test_every_configuration_loads_and_its_model_builds(path):
    import torch

    from pretrain.config import load
    from pretrain.model.config import resolve_model
    from pretrain.model.transformer import Transformer

    config = load(["--config", str(path)], world_size=None)
    vocab_size = config.model.vocab_size or 4096
    model = resolve_model(config.model, vocab_size=vocab_size, sequence_length=config.data.sequence_length)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(model).parameters()) > 0


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=name)
def test_accelerate_files_are_settings_that_accelerate_knows(path):
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))
    assert yaml.safe_load(path.read_text())["distributed_type"]


# ---------------------------------------------------------------- documents


README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def listed_files() -> set[str]:
    """The paths of the README's tree: one per line, two spaces of indent per level; folders end in a slash; then a comment."""
    paths, folders = set(), []
    for line in blocks("text")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        word = line.split()[0]
        path = "/".join([*folders[:depth], word.rstrip("/")])
        assert "  " in line.strip(), f"README: {path} has no comment"
        if word.endswith("/"):
            folders[depth:] = [word.rstrip("/")]
        paths.add(path)
    return paths


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    if not (ROOT / ".git").exists():
        pytest.skip("needs git to list the files of the project")
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    described_as_one_entry = ("tests/", "benchmarks/", "docs/", "configs/models/")
    files = {each for each in known if each and (ROOT / each).exists() and not each.endswith("__init__.py")}
    files = {each for each in files if not each.startswith(described_as_one_entry)}
    listed = listed_files()
    assert sorted(files - listed) == [], "not in the README's tree"
    assert [each for each in sorted(listed) if not (ROOT / each).exists()] == [], "in the README's tree, not on disk"


def test_every_make_target_in_the_readme_exists_and_make_help_explains_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    named = set(
        re.findall(
            r"\bmake ([a-z][a-z-]*)\b(?=`|\s|$)", "\n".join([*blocks("bash"), *re.findall(r"`[^`\n]+`", README.read_text())])
        )
    )
    assert named and named <= targets
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets


# ---------------------------------------------------------------- shell, make, Docker


def test_shell_scripts_parse():
    scripts = [
        path
        for path in [*(ROOT / "launch").glob("*.sh"), *(ROOT / "docker").glob("*.sh"), ROOT / ".ci" / "run"]
        if path.exists()
    ]
    for path in scripts:
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0, name(path)
        assert os.access(path, os.X_OK), f"{name(path)} is not executable"
        assert "set -eu" in path.read_text(), f"{name(path)} would continue after an error"


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_installs_like_the_readme_and_runs_without_root():
    bases = [rest for instruction, rest in instructions() if instruction == "FROM"]
    assert bases
    for base in bases:
        assert re.match(r"[\w./-]+:[\w.-]*\d[\w.-]*( AS \w+)?$|[\w./-]+(:[\w.-]+)?@sha256:[0-9a-f]{64}", base), (
            f"FROM {base} is not pinned"
        )
        assert ":latest" not in base
    runs = " && ".join(rest for instruction, rest in instructions() if instruction == "RUN")
    assert not re.search(r"(curl|wget)[^&|;]*\|\s*(ba|z)?sh", runs), "a downloaded script is run without inspection"
    assert "sudo" not in runs and "sshd" not in runs and "openssh-server" not in runs
    install = "pip install -c constraints.txt -e "
    assert install in runs and install in README.read_text() and install in (ROOT / "Makefile").read_text()
    users = [rest for instruction, rest in instructions() if instruction == "USER"]
    assert users and users[-1].split(":")[0] == "10001"
    for instruction, rest in instructions():
        assert instruction != "ADD", "ADD unpacks and downloads; use COPY"
        assert not re.search(r"(?i)(api_key|token|password|secret)\s*=", rest), "a secret in an image is public"


def test_private_and_large_files_are_excluded_from_the_image():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for each in (".git", ".venv", "runs", "data", "wandb"):
        assert each in ignored or f"/{each}" in ignored
    assert shutil.which("make") is not None
