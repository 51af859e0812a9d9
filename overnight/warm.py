"""Imported once by the fork server: the packages that every training process needs, most of its start-up time."""

import gc

import accelerate  # noqa: F401
import numpy  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401  # the commonest architecture
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

import overnight.problems.sequence_classification
import overnight.search.launch
import overnight.search.trial
import overnight.training.data
import overnight.training.fit  # noqa: F401

# what was imported stays: looking through it again would cost each trial time, and a copy of the pages it lies on
gc.collect()
gc.freeze()
