"""Prefect tasks: how a piece of the library is run (retries, timeout, artifact). The logic is in overnight/."""
