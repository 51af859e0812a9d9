"""How good a model is on the frozen test rows, and whether it is better than another one on the same rows.

evaluation = evaluate(targets, predictions, labels=labels, metric="macro_f1")
comparison = compare(targets, predictions, predictions_of_champion, labels=labels, metric="macro_f1")

Both return plain dicts that JSON can hold. They know predictions alone: no model, no text, no orchestration.
"""

from overnight.evaluation.bootstrap import Metric, Tally
from overnight.evaluation.compare import Comparison, compare
from overnight.evaluation.evaluate import Evaluation, evaluate
from overnight.evaluation.labels import label_tally
from overnight.evaluation.latency import Latency, latencies

__all__ = ["Comparison", "Evaluation", "Latency", "Metric", "Tally", "compare", "evaluate", "label_tally", "latencies"]
