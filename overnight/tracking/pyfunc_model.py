"""The model as MLflow runs it: code, not a pickle. This file travels inside every model version.

    model = mlflow.pyfunc.load_model("models:/sentiment@champion")
    model.predict(pandas.DataFrame({"text": ["what a lovely flight"]}))
    #       label  score                                                  scores
    # 0  positive  0.97   {'negative': 0.01, 'neutral': 0.02, 'positive': 0.97}

The package `overnight` travels beside it, so that it runs where only the model's requirements are installed.
"""

from __future__ import annotations

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class OvernightModel(PythonModel):
    """Input: one row a text, the columns named by the problem's roles. Output: label, its score, the scores of all."""

    def load_context(self, context):  # type: ignore[no-untyped-def]
        from overnight.training.predict import Scorer

        self.scorer = Scorer(context.artifacts["model"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        import pandas as pd

        rows: list[Any] = pd.DataFrame(model_input).to_dict("records")
        return pd.DataFrame(self.scorer.predict_texts(rows), index=getattr(model_input, "index", None))


set_model(OvernightModel())
