"""Old studies: dropped from a database, or left out when the journal file, which only grows, is written anew."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from overnight.search.study import STUDY_OF, open_storage


def is_journal(storage: str) -> bool:
    """Whether the studies are in a journal file, of which nothing can be taken out while a night runs."""
    return "://" not in storage


def old_studies(storage: str, whole: Mapping[str, Collection[str]]) -> list[str]:
    """Studies of the nights that do not stay.

    Args:
        whole: model → its nights that stay; studies of other models, and of nobody's, stay too.
    """
    import optuna

    if is_journal(storage) and not Path(storage).exists():
        return []
    summaries = optuna.get_all_study_summaries(open_storage(storage))
    models = {summary.study_name: str(summary.user_attrs.get(STUDY_OF)) for summary in summaries}
    return sorted(name for name, model in models.items() if model in whole and name not in whole[model])


def drop_studies(storage: str, names: Iterable[str]) -> None:
    """Deletes studies from a database."""
    import optuna

    opened = open_storage(storage)
    for name in names:
        optuna.delete_study(study_name=name, storage=opened)


def rewrite_journal(storage: str, without: Collection[str]) -> None:
    """Writes the journal anew without some studies, and puts it in the place of the one before at once.

    The caller sees to it that no night runs: whoever has the old file open would go on reading at a place that the
    new one does not have.
    """
    import optuna

    path = Path(storage)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)  # of a command that was killed
    old, target = open_storage(str(path)), open_storage(str(new))
    for name in optuna.get_all_study_names(old):
        if name not in without:
            optuna.copy_study(from_study_name=name, from_storage=old, to_storage=target)
    os.replace(new, path)
