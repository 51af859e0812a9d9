"""Tokenized rows on disk, and which of them make which step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.training import data
from overnight.training.batches import Plan, bucket, token_budget

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(np.array)


def test_rows_come_back(tmp_path):
    """What is written in several batches is read back row by row, without being loaded."""
    batches = [
        {"input_ids": [[1, 2, 3], [4]], "token_type_ids": [[0, 1, 1], [0]], "labels": [0, 2]},
        {"input_ids": [[5, 6]], "token_type_ids": [[1, 0]], "labels": [1]},
    ]
    data.write(tmp_path, iter(batches), {"max_length": 16})
    rows = data.open(tmp_path)
    assert len(rows) == 3 and rows.lengths.tolist() == [3, 1, 2]
    assert rows.meta["max_length"] == 16 and rows.meta["rows"] == 3
    assert {k: v.tolist() for k, v in rows[2].items()} == {"input_ids": [5, 6], "token_type_ids": [1, 0], "labels": 1}
    assert rows.column("labels").tolist() == [0, 2, 1]
    assert isinstance(rows.column("labels").base, np.memmap)
    with pytest.raises(KeyError):
        rows.column("input_ids")


def test_values_of_all_rows(tmp_path):
    """One row's after another's, also of some of the rows."""
    rows = data.write(tmp_path, [{"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [7, 8, 9]}], {})
    assert rows.values("input_ids").tolist() == [1, 2, 3, 4, 5, 6]
    some = data.Part(rows, np.array([2, 0]))
    assert some.values("input_ids").tolist() == [4, 5, 6, 1, 2] and some.values("labels").tolist() == [9, 7]


def test_zero_token_types_take_no_room(tmp_path):
    """Single texts have token types of zeros only, which every model assumes by itself."""
    rows = data.write(tmp_path, [{"input_ids": [[1, 2]], "token_type_ids": [[0, 0]]}], {})
    assert set(rows[0]) == {"input_ids"}
    assert not list(tmp_path.glob("token_type_ids*"))


def test_lists_of_other_lengths(tmp_path):
    """A feature with lists may be longer or shorter than the tokens (targets of a translation)."""
    rows = data.write(tmp_path, [{"input_ids": [[1], [2, 3]], "labels": [[7, 8, 9], [7]]}], {})
    assert rows[0]["labels"].tolist() == [7, 8, 9]
    batch = data.pad([rows[0], rows[1]], pad_token_id=5)
    assert batch["labels"].tolist() == [[7, 8, 9], [7, -100, -100]]
    assert batch["input_ids"].tolist() == [[1, 5], [2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_half_written_rows_are_not_opened(tmp_path):
    """The manifest comes last: a writer that dies leaves nothing that looks complete, not even over older rows."""
    data.write(tmp_path, [{"input_ids": [[1]]}], {})

    def dies():
        yield {"input_ids": [[1], [2]]}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        data.write(tmp_path, dies(), {})
    with pytest.raises(FileNotFoundError):
        data.open(tmp_path)


def test_write_refuses_nonsense(tmp_path):
    """No rows, columns that change and columns of different length are errors, not damaged folders."""
    with pytest.raises(ValueError, match="no rows"):
        data.write(tmp_path, [{"input_ids": []}], {})
    with pytest.raises(ValueError, match="must be equal"):
        data.write(tmp_path, [{"input_ids": [[1]]}, {"input_ids": [[1]], "labels": [1]}], {})
    with pytest.raises(ValueError, match="must have 2 rows"):
        data.write(tmp_path, [{"input_ids": [[1], [2]], "labels": [1]}], {})


@given(lengths=LENGTHS, budget=st.integers(1, 2000))
def test_buckets_cover_and_respect_the_budget(lengths, budget):
    """Every row is in exactly one batch, and no batch of more than one row is larger than the budget."""
    batches = bucket(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(rows) and (len(rows) == 1 or len(rows) * lengths[rows].max() <= budget) for rows in batches)


@given(lengths=LENGTHS, batch_size=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=50)
def test_each_epoch_covers_every_row_once(lengths, batch_size, seed):
    """Each epoch of a plan has every row once, within the budget; its steps add up."""
    plan = Plan(lengths, batch_size, 2, seed, by_length=True)
    budget = token_budget(lengths, batch_size)
    first, second = plan.epoch(0), plan.epoch(1)
    for batches in (first, second):
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= budget for rows in batches)
    assert plan.steps == len(first) + len(second)
    walked = [plan.rows(step).tolist() for step in range(plan.steps)]
    assert walked == [rows.tolist() for rows in first + second]


def test_buckets_are_tight_and_varied():
    """On lengths like those of tweets: hardly any padding, about batch_size rows a step, other batches each epoch."""
    lengths = np.random.default_rng(0).gamma(6, 6, 3000).astype(int) + 3
    plan = Plan(lengths, 32, 2, seed=1, by_length=True)
    first, second = plan.epoch(0), plan.epoch(1)
    padded = sum(len(rows) * lengths[rows].max() for rows in first)
    assert 1 - lengths.sum() / padded < 0.04
    assert 26 <= len(lengths) / len(first) <= 36
    together = [{frozenset(rows.tolist()) for rows in batches} for batches in (first, second)]
    assert len(together[0] & together[1]) < 0.1 * len(first)
    sizes = [lengths[rows].mean() for rows in first]
    assert abs(np.corrcoef(sizes, np.arange(len(sizes)))[0, 1]) < 0.3, "batches come in a shuffled order"
    assert [r.tolist() for r in Plan(lengths, 32, 2, seed=1, by_length=True).epoch(1)] == [r.tolist() for r in second]
    assert [r.tolist() for r in Plan(lengths, 32, 2, seed=2, by_length=True).epoch(1)] != [r.tolist() for r in second]


def test_fractional_epochs():
    """Half an epoch is half its steps; the least is one step."""
    lengths = np.full(100, 10)
    assert Plan(lengths, 10, 1, 0, by_length=True).steps == 10
    assert Plan(lengths, 10, 0.5, 0, by_length=True).steps == 5
    assert Plan(lengths, 10, 2.3, 0, by_length=True).steps == 23
    assert Plan(lengths, 10, 0.001, 0, by_length=True).steps == 1
