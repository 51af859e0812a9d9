"""Imported once by the fork server: the packages that every training process needs, most of its start-up time."""

import accelerate  # noqa: F401
import numpy  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401  # the commonest architecture
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
