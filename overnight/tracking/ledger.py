"""The ledger: who put which version into production, when and why. Entries are added, never changed.

    promote(home, "sentiment", 7, reason="gate passed", who="nightly", smoke=check)
    rollback(home, "sentiment", reason="complaints from support", who="ana", smoke=check)
    observe(home, "sentiment", smoke=check)          # a champion that came by other means
    for entry in read(home, "sentiment"): ...

Kept twice: as tags of the registered model in MLflow (where a shared installation sees it) and as JSON lines in
`ledger/<name>.jsonl` under the home; either can be rebuilt from the other. An entry's `id` is the hash of its
content, and it names the id of the entry before it, so that a changed or missing entry shows (`problems`).
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from overnight.errors import Complaint, NightFailed, OvernightError, UserError
from overnight.home import Home
from overnight.tracking import registry
from overnight.tracking.registry import CHAMPION, Version
from overnight.tracking.store import TrackingUnavailable, client, reaching

PREFIX = "overnight.ledger."
LONGEST = 4900
"""Characters of an entry: MLflow's column for tags of registered models holds 5,000."""
MOVES = ("promote", "rollback", "observed")
SMOKE, PASSED = "smoke", "passed"
OURSELVES = "overnight"
"""Who writes what no person said."""


@dataclass(frozen=True)
class Entry:
    """One line of history; `time` in epoch seconds.

    `action`: promote, rollback, keep (a candidate did not become champion), refuse (one that waited for a person is
    kept out), observed (somebody moved the alias by other means).
    """

    n: int
    time: float
    name: str
    action: str
    from_version: int | None
    to_version: int | None
    reason: str
    who: str
    night: str | None = None
    gate: Mapping[str, Any] | None = None
    """What was decided about and how: `Decision.record()`; of an observed champion what its smoke test said."""
    previous: str | None = None
    id: str = ""

    @property
    def key(self) -> str:
        # two machines on one server may both write entry n; neither overwrites the other's
        return f"{PREFIX}{self.n:06d}.{self.id}"


def read(home: Home, name: str) -> list[Entry]:
    """All entries, oldest first, from both places; what is missing in one is written there.

    While MLflow is away the copy under the home answers.

    Raises:
        UserError: no such model.
        TrackingUnavailable: when MLflow is away and the home has no copy.
    """
    mirrored = _mirrored(home, name)
    try:
        kept = _kept(home, name)
    except TrackingUnavailable:
        if not mirrored:
            raise
        return _ordered(mirrored)
    if kept is None:
        if not mirrored:
            registry.versions(home, name)  # raises with the nearest name
        return _ordered(mirrored)
    return _ordered(kept | mirrored)


def last_move(home: Home, name: str) -> Entry | None:
    """The last move of the champion alias that the home's copy knows of; asks nobody else."""
    return _last_move(_ordered(_mirrored(home, name)))


def rebuild(home: Home, name: str) -> int:
    """Writes into MLflow and into the home what only the other has; returns how many entries had been lost.

    Those of a shared server that this home has not seen yet are news of other machines, not losses.
    """
    with registry.one_writer(home, name), reaching(home):
        mirrored, kept = _mirrored(home, name), _kept(home, name)
        if kept is None:
            return 0
        for entry in _ordered({id: entry for id, entry in mirrored.items() if id not in kept}):
            client(home).set_registered_model_tag(name, entry.key, _line(entry))
        missing = _ordered({id: entry for id, entry in kept.items() if id not in mirrored})
        if missing:
            _mirror(home, name, missing)
        return len(mirrored.keys() - kept.keys()) + (len(missing) if home.embedded_tracking else 0)


def problems(entries: list[Entry]) -> list[str]:
    """What does not fit together in a history, in words; empty when it is whole."""
    known = {entry.id for entry in entries}
    found = [f"entry {e.n} was changed after it was written" for e in entries if e.id != _digest(e)]
    return found + [f"the entry before {e.n} is missing" for e in entries if e.previous and e.previous not in known]


def promote(
    home: Home,
    name: str,
    number: int,
    *,
    reason: str,
    smoke: Callable[[Path], None],
    who: str | None = None,
    night: str | None = None,
    gate: Mapping[str, Any] | None = None,
) -> Entry:
    """Makes a version the champion: smoke test, alias, read back, ledger; whatever fails, the old champion stays.

    Args:
        smoke: is given the model folder of the version and raises when it cannot be used.
        who: a person or the flow; absent: the user of this process.
        gate: the decision in short; long ones are cut to what fits.

    Raises:
        UserError: no such model or version, an unfinished version, or it is the champion already.
        NightFailed: the smoke test or the writing failed; production is untouched.
        TrackingUnavailable: when MLflow does not answer; production is untouched, unless the alias had moved and MLflow
            stays away: then `observe` completes the ledger.
    """
    return _move(home, name, number, "promote", reason, smoke, who, night, gate)


def rollback(
    home: Home,
    name: str,
    *,
    reason: str,
    smoke: Callable[[Path], None],
    to: int | None = None,
    who: str | None = None,
) -> Entry:
    """Puts an earlier version back: the one before the champion by the ledger, or the one named.

    Raises: as `promote`; UserError too when there is no earlier champion.
    """
    with registry.one_writer(home, name):
        if to is None:
            to = _before(home, name)
        return _move(home, name, to, "rollback", reason, smoke, who, None, None)


def record(
    home: Home,
    name: str,
    action: str,
    *,
    from_version: int | None,
    to_version: int | None,
    reason: str,
    who: str | None = None,
    night: str | None = None,
    gate: Mapping[str, Any] | None = None,
) -> Entry:
    """Adds an entry and reads it back; in MLflow first, which is what counts. A continued night adds none twice.

    Raises:
        NightFailed: MLflow did not keep it.
        TrackingUnavailable: when MLflow does not answer.
    """
    with registry.one_writer(home, name), reaching(home):
        entries = read(home, name)
        written = [e for e in entries if night and (e.night, e.action, e.to_version) == (night, action, to_version)]
        if written:
            return written[-1]
        last = entries[-1] if entries else None
        entry = _fitting(
            Entry(
                n=last.n + 1 if last else 1,
                time=round(time.time(), 3),
                name=name,
                action=action,
                from_version=from_version,
                to_version=to_version,
                reason=reason,
                who=who or getpass.getuser(),
                night=night,
                gate=gate,
                previous=last.id if last else None,
            )
        )
        client(home).set_registered_model_tag(name, entry.key, _line(entry))
        if entry.id not in (_kept(home, name) or {}):
            raise NightFailed(Complaint(name, "MLflow did not keep the ledger entry"))
        try:
            _mirror(home, name, [entry])
        except OSError:  # a full disk; `rebuild` completes the copy later
            pass
        return entry


def observe(home: Home, name: str, *, smoke: Callable[[Path], None]) -> Entry | None:
    """Records a champion that came by other means: MLflow's pages, or a promotion cut short between alias and ledger.

    It gets the smoke test that every champion gets. The entry says when that failed; the alias stays where somebody
    put it.

    Raises:
        TrackingUnavailable: when MLflow or the artifact store does not answer; then nothing is recorded yet.
    """
    with registry.one_writer(home, name):
        now = registry.champion(home, name)
        if now is None:
            return None
        last = _last_move(read(home, name))
        written = last.to_version if last else None
        if now.number == written:
            return None
        reason, failure = "the alias was moved without a ledger entry", None
        try:
            smoke(registry.download(home, now))
        except TrackingUnavailable:
            raise
        except Exception as error:  # what it was is for the reader: nothing here depends on it
            failure = str(error) or type(error).__name__
            reason += f"; its smoke test failed: {failure}"
        return record(
            home,
            name,
            "observed",
            from_version=written,
            to_version=now.number,
            reason=reason,
            who=OURSELVES,
            gate={SMOKE: (failure or PASSED)[:2000]},
        )


def doubt(home: Home, name: str) -> str | None:
    """What the smoke test said of a champion that was set by other means and is champion still; None when it passed."""
    last = _last_move(_ordered(_mirrored(home, name) | (_kept(home, name) or {})))
    if last is None or last.action != "observed" or (last.gate or {}).get(SMOKE, PASSED) == PASSED:
        return None
    way = f"`overnight rollback {name}` brings the champion before it back"
    return f"version {last.to_version} became champion by other means; {(last.gate or {})[SMOKE]}; {way}"


def _move(
    home: Home,
    name: str,
    number: int,
    action: str,
    reason: str,
    smoke: Callable[[Path], None],
    who: str | None,
    night: str | None,
    gate: Mapping[str, Any] | None,
) -> Entry:
    with registry.one_writer(home, name), reaching(home):
        version = registry.version_of(home, name, number)
        if not version.complete:
            raise UserError(Complaint(version.model_uri, "was never finished, it cannot become champion"))
        old = registry.champion(home, name)
        entries = read(home, name)
        last = _last_move(entries)
        if old and last and old.number == number == last.to_version:
            if night and last.night == night:  # continued after it was killed behind this very point
                return last
            raise UserError(Complaint(name, f"version {number} is the champion already"))
        _smoke(home, version, old, smoke)
        try:
            registry.set_alias(home, name, CHAMPION, number)
            before = old.number if old and old.number != number else last.to_version if last else None
            return record(
                home,
                name,
                action,
                from_version=before,
                to_version=number,
                reason=reason,
                who=who,
                night=night,
                gate=gate,
            )
        except BaseException:
            with suppress(OvernightError):  # the first error says what happened
                _put_back(home, name, number, old)
            raise


def _smoke(home: Home, version: Version, old: Version | None, smoke: Callable[[Path], None]) -> None:
    try:
        smoke(registry.download(home, version))
    except OvernightError:
        raise
    except Exception as error:
        stays = f"version {old.number} stays champion" if old else "nothing was promoted"
        reason = f"{type(error).__name__}: {error}"
        raise NightFailed(Complaint(version.model_uri, f"the smoke test failed ({reason}); {stays}")) from error


def _put_back(home: Home, name: str, number: int, old: Version | None) -> None:
    found = registry.champion(home, name)
    if found is None or found.number != number:  # MLflow never moved it, or somebody else moved it on
        return
    if old is None:
        registry.remove_alias(home, name, CHAMPION)
    else:
        registry.set_alias(home, name, CHAMPION, old.number)


def _before(home: Home, name: str) -> int:
    """The champion before the present one, by the ledger; versions that were deleted since are passed over."""
    entries = read(home, name)
    exist = {version.number for version in registry.versions(home, name) if version.complete}
    champion = registry.champion(home, name)
    number, seen = (champion.number if champion else None), set()
    while number is not None and number not in seen:
        seen.add(number)
        came = [e for e in entries if e.action in MOVES and e.to_version == number and e.from_version != number]
        # what a rollback left behind is not what came before it
        came = [e for e in came if e.action != "rollback"] or came
        number = came[-1].from_version if came else None
        if number in exist and number not in seen:
            return number
    have = f"version {champion.number} is the first" if champion else "there is no champion"
    raise UserError(Complaint(name, f"no earlier champion to go back to ({have})"))


def _last_move(entries: list[Entry]) -> Entry | None:
    moves = [entry for entry in entries if entry.action in MOVES]
    return moves[-1] if moves else None


def _kept(home: Home, name: str) -> dict[str, Entry] | None:
    """The entries in MLflow; None when there is no such registered model."""
    from mlflow.exceptions import MlflowException

    with reaching(home):
        try:
            tags = client(home).get_registered_model(name).tags
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    return _entries(value for key, value in tags.items() if key.startswith(PREFIX))


def _mirrored(home: Home, name: str) -> dict[str, Entry]:
    try:
        return _entries((home.root / "ledger" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    except OSError:
        return {}


def _entries(lines: Any) -> dict[str, Entry]:
    """Entries by id; a line that a full disk cut short is passed over, MLflow has it whole."""
    found = {}
    for line in lines:
        try:
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[entry.id] = entry
    return found


def _ordered(entries: Mapping[str, Entry]) -> list[Entry]:
    return sorted(entries.values(), key=lambda entry: (entry.n, entry.time, entry.id))


def _mirror(home: Home, name: str, entries: list[Entry]) -> None:
    path = home.folder("ledger") / f"{name}.jsonl"
    with open(path, "a+b") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            file.write(b"\n")  # after a line cut short
        file.write("".join(f"{_line(entry)}\n" for entry in entries).encode())
        file.flush()
        os.fsync(file.fileno())


def _line(entry: Entry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False, sort_keys=True, default=str)


def _digest(entry: Entry) -> str:
    return hashlib.sha256(_line(replace(entry, id="")).encode()).hexdigest()[:16]


def _fitting(entry: Entry) -> Entry:
    """The entry with its id, cut to what MLflow's column holds: first the gate's longest facts go, then words."""
    entry = replace(entry, reason=entry.reason[:2000], who=entry.who[:200], night=entry.night and entry.night[:200])
    # as it will be read again: tuples become lists, numbers of other kinds become text
    gate = json.loads(json.dumps(entry.gate, default=str)) if entry.gate is not None else None
    while gate and len(_line(replace(entry, gate=gate))) > LONGEST:
        del gate[max(gate, key=lambda key: len(json.dumps(gate[key])))]
    entry = replace(entry, gate=gate)
    return replace(entry, id=_digest(entry))
