"""The MLflow side: experiments, runs, models and files, and the registry of models."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before MLflow is imported, which starts it
