"""The YAML of one model: facts, no code. Closed, frozen, and every mistake of a file reported at once.

    config = load_config("configs/sentiment.yaml", ["training.epochs=1"], problems=problems.roles())

sections.py says what a file may hold, load.py reads it and words the complaints.
"""

from overnight.config.load import ARROW, config_hash, json_schema, load_config, read_notify
from overnight.config.operations import Notification, Retention
from overnight.config.sections import (
    Config,
    Data,
    Domain,
    Elsewhere,
    Evaluation,
    Expectations,
    FurtherExpectation,
    Model,
    Promotion,
    Search,
    Split,
    Validation,
    with_parameters,
)

__all__ = [
    "ARROW",
    "Config",
    "Data",
    "Domain",
    "Elsewhere",
    "Evaluation",
    "Expectations",
    "FurtherExpectation",
    "Model",
    "Notification",
    "Promotion",
    "Retention",
    "Search",
    "Split",
    "Validation",
    "config_hash",
    "json_schema",
    "load_config",
    "read_notify",
    "with_parameters",
]
