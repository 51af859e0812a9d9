"""A model whose base is another registered model: `model: {base: models:/news@champion}`."""

from __future__ import annotations

import re

from overnight.config import Config
from overnight.errors import Complaint, UserError, nearest
from overnight.home import Home
from overnight.tracking import registry, store

PREFIX = "models:/"
_REFERENCE = re.compile(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<number>\d+))")
WHERE = "model → base"


def on_its_base(home: Home, config: Config) -> tuple[Config, str | None]:
    """The config with the folder of the version that its base is tonight, and that version in words.

    Another base, a folder or a hub name, stays as it is. The folder is a version's own, so a night whose base has a new
    champion is another night.

    Raises:
        UserError: there is no such model, version or alias.
        NightFailed: its weights are not those that were registered.
        TrackingUnavailable: when MLflow does not answer.
    """
    base = config.model.base
    if not base.startswith(PREFIX):
        return config, None
    match = _REFERENCE.fullmatch(base)
    if match is None:
        raise UserError(Complaint(WHERE, "must read models:/name@alias or models:/name/number", repr(base)))
    store.prepare(home)
    name, alias, number = match["name"], match["alias"], match["number"]
    known = registry.names(home)
    if name not in known:
        raise UserError(Complaint(WHERE, "no such registered model", repr(name), nearest(name, known)))
    version = registry.version_of(home, name, int(number)) if number else registry.by_alias(home, name, alias)
    if version is None:
        aliases = [known for one in registry.versions(home, name) for known in one.aliases]
        raise UserError(Complaint(WHERE, f"no version of {name} has this alias", repr(alias), nearest(alias, aliases)))
    model = config.model.model_copy(update={"base": str(registry.download(home, version)), "revision": None})
    return config.model_copy(update={"model": model}), f"{name} version {version.number}"
