"""Prefect flows: in which order tasks run. Each file is a recipe, read from top to bottom."""
