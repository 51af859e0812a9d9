"""The YAML of one model: facts, no code. Closed, frozen, and every mistake of a file reported at once.

    config = load_config("configs/sentiment.yaml", ["training.epochs=1"], problems=problems.roles())

sections.py says what a file may hold, load.py reads it and words the complaints.
"""

from overnight.config.load import ARROW, config_hash, json_schema, load_config
from overnight.config.operations import Retention
from overnight.config.sections import (
    Config,
    Data,
    Domain,
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
    "Evaluation",
    "Expectations",
    "FurtherExpectation",
    "Model",
    "Promotion",
    "Retention",
    "Search",
    "Split",
    "Validation",
    "config_hash",
    "json_schema",
    "load_config",
    "with_parameters",
]
