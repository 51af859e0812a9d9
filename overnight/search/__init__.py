"""The search: an Optuna study over fine-tuning runs, each in a process of its own.

study.py asks Optuna, trial.py runs one training process and tells what came of it. Only this package imports optuna.
"""
