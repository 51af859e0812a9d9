"""One Optuna study a night: what to try next, what has been tried, what to prune.

A study bears its night's id. A killed night's study is opened again as it was: finished trials count, trials that were
running are handed out once more under their own number, so that they continue from their snapshot.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overnight.config import Search
from overnight.errors import Complaint, NightFailed

Direction = Literal["maximize", "minimize"]
STUDY_OF = "overnight.model"
FEWEST = 5
"""Finished trials below which importances would be noise."""
TOLD = ("seconds", "samples_per_second", "tokens_per_second", "steps", "stopped", "error")


@dataclass(frozen=True)
class Ask:
    """A trial to run: its number in the study and the parameters it drew."""

    number: int
    params: dict[str, Any]


def open_storage(storage: str) -> Any:
    """Optuna's storage behind the path of a journal file or the URL of a database.

    Raises:
        NightFailed: the database does not answer, or is none of Optuna's.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in storage:
        try:
            return RDBStorage(storage)
        except (ImportError, optuna.exceptions.OptunaError, SQLAlchemyError) as error:
            reason = type(error.__cause__ or error).__name__  # its text may hold the address, and so a password
            rule = f"the database of the studies cannot be used ({reason})"
            raise NightFailed(Complaint("OVERNIGHT_STUDY_STORAGE", rule)) from None
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


class Study:
    """The study of one night.

    Args:
        storage: path of a journal file, or the URL of a database.
        name: the night's id.
        model: name of the model, by which later nights find this one's best parameters.
        search: the `search:` section.
        evaluations: evaluations that a full trial makes, for the pruner.
        direction: "maximize" or "minimize".
    """

    def __init__(self, storage: str, name: str, model: str, search: Search, evaluations: int, direction: Direction):
        import optuna

        self.search, self._model = search, model
        self._optuna = optuna
        self._store = open_storage(storage)
        known = set(optuna.get_all_study_names(self._store))
        self._study = optuna.create_study(
            study_name=name,
            storage=self._store,
            direction=direction,
            load_if_exists=True,
            pruner=_pruner(search, evaluations),
        )
        if name not in known:
            self._study.set_user_attr(STUDY_OF, model)
            self._enqueue_earlier(model, known)
        self._to_continue: list[int] = []
        self._seeded = False

    def continue_running(self) -> None:
        """Hands out again the trials that a killed night left running; only the one who holds the night may ask so."""
        self._to_continue = [t.number for t in self._trials("RUNNING")]

    def fail_abandoned(self) -> None:
        """Closes the trials that this model's earlier nights left running and that nobody will continue."""
        for summary in self._summaries():
            if summary.study_name == self._study.study_name or summary.user_attrs.get(STUDY_OF) != self._model:
                continue
            other = self._optuna.load_study(study_name=summary.study_name, storage=self._store)
            for trial in other.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState.RUNNING]):
                other.tell(trial.number, state=self._optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def ask(self) -> Ask:
        """The next trial to run: first those that a killed night left running."""
        if self._to_continue:
            frozen = self._study.trials[self._to_continue.pop(0)]
            return Ask(frozen.number, dict(frozen.params))
        if not self._seeded:  # not at the start: the trials open the study too, and only report
            # a fixed seed would draw the start-up points of a continued study, or of last night's, a second time
            drawn = sum(s.n_trials for s in self._summaries() if s.user_attrs.get(STUDY_OF) == self._model)
            self._study.sampler = _sampler(self.search, seed=self.search.seed + drawn)
            self._seeded = True
        trial = self._study.ask(_distributions(self.search))
        return Ask(trial.number, dict(trial.params))

    def report(self, number: int, evaluation: int, value: float) -> bool:
        """Stores the value of a trial's evaluation; True when the trial should be pruned."""
        trial = self._trial(number)
        known = self._study.trials[number].intermediate_values
        if evaluation not in known:  # a continued trial repeats what came after its snapshot
            trial.report(value, evaluation)
        return bool(trial.should_prune())

    def tell(self, number: int, state: str, value: float | None = None, facts: Mapping[str, Any] | None = None) -> None:
        """Closes a trial as "finished" (with its value), "pruned" or "failed"."""
        for key in TOLD:
            if facts and facts.get(key) is not None:
                self._trial(number).set_user_attr(key, facts[key])
        states = self._optuna.trial.TrialState
        names = {"finished": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
        self._study.tell(number, value if state == "finished" else None, state=names[state], skip_if_finished=True)

    @property
    def remaining(self) -> int:
        """Trials still to be handed out: failed ones are not made up for."""
        closed = [t for t in self._study.get_trials(deepcopy=False) if t.state.is_finished()]
        running = len(self._trials("RUNNING")) - len(self._to_continue)
        return self.search.wanted - len(closed) - running

    @property
    def counts(self) -> dict[str, int]:
        """Number of trials by what became of them."""
        names = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        return {name: len(self._trials(state)) for state, name in names.items()}

    def best(self) -> Ask:
        """The finished trial with the best value.

        Raises:
            NightFailed: when none has finished.
        """
        try:
            best = self._study.best_trial
        except ValueError:
            raise NightFailed(Complaint("search", "no trial finished", f"{self.counts['failed']} failed")) from None
        return Ask(best.number, dict(best.params))

    def importances(self) -> dict[str, float]:
        """Share of the metric's differences that each parameter accounts for (PED-ANOVA), the greatest first.

        Empty where nothing can be said: fewer than FEWEST finished trials, one parameter, or all came out alike.
        """
        if self.counts["finished"] < FEWEST:
            return {}
        with warnings.catch_warnings(action="ignore"):  # that all came out alike
            found = self._optuna.importance.get_param_importances(self._study)
        told_apart = len(set(found.values())) > 1
        return {name: round(float(share), 4) for name, share in found.items()} if told_apart else {}

    def rows(self) -> list[dict[str, Any]]:
        """One record a trial, for tables and the report."""
        names = {
            "COMPLETE": "finished",
            "PRUNED": "pruned",
            "FAIL": "failed",
            "RUNNING": "running",
            "WAITING": "waiting",
        }
        return [
            {
                "number": t.number,
                "state": names[t.state.name],
                "value": t.value if t.value is not None else _last_value(t),
                "params": dict(t.params),
                "evaluations": {str(step): value for step, value in sorted(t.intermediate_values.items())},
                **{k: v for k, v in t.user_attrs.items() if k in TOLD},
            }
            for t in self._study.get_trials(deepcopy=False)
            if t.state.name in names
        ]

    def _enqueue_earlier(self, model: str, names: set[str]) -> None:
        """Last nights' best parameters are tried first; those outside today's space are left out."""
        enqueued: list[dict[str, Any]] = []
        if not self.search.space:
            return
        for summary in sorted(
            (s for s in self._summaries() if s.study_name in names),
            key=lambda s: s.datetime_start.timestamp() if s.datetime_start else 0.0,
            reverse=True,
        ):
            if len(enqueued) >= self.search.warm_start:
                break
            if summary.user_attrs.get(STUDY_OF) != model or summary.best_trial is None:
                continue
            space = _distributions(self.search)
            params = {k: v for k, v in summary.best_trial.params.items() if k in space and _inside(space[k], v)}
            if params and params not in enqueued:
                enqueued.append(params)
                self._study.enqueue_trial(params, user_attrs={"from": summary.study_name})

    def _summaries(self) -> list[Any]:
        return list(self._optuna.get_all_study_summaries(self._store))

    def _trials(self, state: str) -> list[Any]:
        return self._study.get_trials(deepcopy=False, states=[self._optuna.trial.TrialState[state]])

    def _trial(self, number: int) -> Any:
        return self._optuna.trial.Trial(self._study, self._study.trials[number]._trial_id)


def _last_value(trial: Any) -> float | None:
    return None if trial.last_step is None else float(trial.intermediate_values[trial.last_step])


def _distributions(search: Search) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, domain in search.space.items():
        if domain.choices is not None:
            found[name] = CategoricalDistribution(domain.choices)
        elif isinstance(domain.low, int) and isinstance(domain.high, int):
            found[name] = IntDistribution(domain.low, domain.high, log=domain.log)
        else:
            found[name] = FloatDistribution(float(domain.low or 0), float(domain.high or 0), log=domain.log)
    return found


def _inside(distribution: Any, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:
        return False


def _sampler(search: Search, seed: int) -> Any:
    from optuna.samplers import RandomSampler, TPESampler

    if search.sampler == "random":
        return RandomSampler(seed=seed)
    # a night has few trials: a third of them to look around, at most ten
    # and what runs beside a new trial counts as bad until it is known, so that trials do not crowd together
    return TPESampler(seed=seed, n_startup_trials=max(2, min(10, search.trials // 3)), constant_liar=True)


def _pruner(search: Search, evaluations: int) -> Any:
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    if search.pruner == "median":
        return MedianPruner(n_startup_trials=2, n_warmup_steps=max(0, search.prune_after - 1))
    if search.pruner == "hyperband":
        return HyperbandPruner(min_resource=max(1, search.prune_after), max_resource=max(2, evaluations))
    return NopPruner()
