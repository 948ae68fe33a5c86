"""Opens what a configuration names: tokenizer, data and the resolved model."""

from __future__ import annotations

from typing import NamedTuple

from pretrain import stages
from pretrain.config import Config, ConfigError, work_of
from pretrain.data.batches import TrainData, ValidData, open_train, open_valid
from pretrain.data.tasks import Task, open_tasks
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.config import check_mesh
from pretrain.model.config import ModelConfig, resolve_model, vocabulary
from pretrain.report.expected import Expected
from pretrain.run import band


class Parts(NamedTuple):
    """The parts of a run that need no device."""

    tokenizer: Tokenizer | None
    """None: the settings name none."""
    data: TrainData
    valid: list[ValidData]
    model: ModelConfig
    """Resolved."""
    tasks: list[Task]
    expected: Expected | None
    """The band of the validation loss; None: the settings name none."""


def open_parts(config: Config, tokenizer: Tokenizer | None = None) -> Parts:
    """Opens everything that `config` names. Raises DataError, ConfigError for a vocabulary that ranks cannot
    share, and UserError for a prediction of another run.

    tokenizer: the one of `config`, if it is open already.
    """
    tokenizer = tokenizer or open_tokenizer(config)
    model_ids, data_ids = vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    opened = dict(seed=config.run.seed, vocab_size=data_ids, tokenizer_fingerprint=tokenizer and tokenizer.fingerprint)
    model = resolve_model(config.model, vocab_size=model_ids, sequence_length=stages.longest(config))
    if problems := list(check_mesh(config.engine, work_of(config, model), ranks=None)):
        raise ConfigError(problems)
    planned = [(stage.position, stage.config.data) for stage in stages.layout(config)]
    data, valid = open_train(config.data, stages=planned, **opened), open_valid(config.data, **opened)
    return Parts(tokenizer, data, valid, model, open_tasks_of(config, tokenizer, model), band.of(config, model))


def open_tasks_of(config: Config, tokenizer: Tokenizer | None, model: ModelConfig) -> list[Task]:
    """The tasks that `config` names, tokenized. model: resolved. Raises DataError."""
    settings = config.evaluate
    return open_tasks(settings.tasks, tokenizer, model.max_position_embeddings, model.vocab_size, settings.task_items)


def open_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that `config` names; None where it names none. Raises DataError."""
    return Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else None
