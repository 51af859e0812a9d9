"""MLflow: runs, registered models, aliases and the ledger. The only package that imports mlflow.

    store     the database or server: prepared once, reached through an explicit client
    runs      one run a night, one child run a trial, replayed from the trial folders
    registry  model versions: registered, listed, fetched, named by the aliases `candidate` and `champion`
    ledger    promotions and rollbacks, append-only

Every module imports mlflow inside its functions: the command line imports this package, and mlflow costs seconds.
"""
