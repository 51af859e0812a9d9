"""The model as MLflow runs it: code, not a pickle. This file travels inside every model version.

    model = mlflow.pyfunc.load_model("models:/sentiment@champion")
    model.predict(pandas.DataFrame({"text": ["what a lovely flight"]}))
    #       label  score                                                  scores
    # 0  positive  0.97   {'negative': 0.01, 'neutral': 0.02, 'positive': 0.97}

The package `overnight` travels beside it, so that it runs where only the model's requirements are installed.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class OvernightModel(PythonModel):
    """Input: one row a text, the columns named by the problem's roles. Output: its answers, a column for each part."""

    def load_context(self, context: Any) -> None:
        from overnight.training.predict import Scorer

        self.scorer = Scorer(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        rows: list[Any] = model_input.to_dict("records")
        return pd.DataFrame(self.scorer.predict_texts(rows), index=model_input.index)


set_model(OvernightModel())
