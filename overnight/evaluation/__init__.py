"""How good a model is on the frozen test rows, and whether it is better than another one on the same rows.

evaluation = evaluate(problem, facts, targets, predictions, metric="macro_f1")
comparison = compare(problem, facts, targets, predictions, predictions_of_champion, metric="macro_f1")

Both return plain dicts that JSON can hold. They know predictions alone: no model, no text, no orchestration.
"""

from overnight.evaluation.bootstrap import Metric
from overnight.evaluation.compare import Comparison, compare
from overnight.evaluation.evaluate import Evaluation, evaluate
from overnight.evaluation.latency import Latency, latencies

__all__ = ["Comparison", "Evaluation", "Latency", "Metric", "compare", "evaluate", "latencies"]
