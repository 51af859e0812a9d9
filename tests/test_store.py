"""Parquet files in pieces: whole or absent, and rows in another order than they came in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data.spool import Spool
from overnight.data.store import BATCH, TableFile, read_cells, read_rows, read_tables, table_of

PIECES = st.lists(st.integers(0, 7), min_size=1, max_size=8)


def pieces_of(sizes: list[int]) -> list[pa.Table]:
    """Tables of these lengths, their rows numbered through."""
    starts = np.cumsum([0, *sizes])
    return [
        table_of({"text": [f"text {i}" for i in range(start, start + size)], "source_row": range(start, start + size)})
        for start, size in zip(starts.tolist(), sizes, strict=False)
    ]


@settings(deadline=None)
@given(PIECES, st.integers(1, 9))
def test_a_file_of_pieces_is_read_as_it_was_written(sizes, batch):
    """All rows in order, whatever the pieces, in row groups of one length; columns and single rows too."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("overnight.data.store.BATCH", batch)
        path = Path(name) / "new" / "rows.parquet"
        pieces = pieces_of(sizes)
        with TableFile(path) as file:
            for piece in pieces:
                file.add(piece)
            assert not path.exists()
        count = sum(sizes)
        assert pq.read_table(path).equals(pa.concat_tables(pieces))
        groups = pq.ParquetFile(path).metadata
        lengths = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        assert [n for n in lengths if n] == [min(batch, count - start) for start in range(0, count, batch)]
        assert [len(table) for table in read_tables(path)] == ([n for n in lengths if n] or [0])
        assert list(read_cells(path, "source_row")) == list(range(count))
        some = [place for place in (7, 0, count - 1) if 0 <= place < count]
        assert read_rows(path, some, ["text", "source_row"]) == {place: (f"text {place}", place) for place in some}


def test_an_error_on_the_way_leaves_the_old_file(tmp_path):
    """What is begun and not ended is no file, and nothing half-made stays beside the old one."""
    path = tmp_path / "rows.parquet"
    first, second = pieces_of([3, BATCH])
    with TableFile(path) as file:
        file.add(first)
    with pytest.raises(ValueError, match="elsewhere"), TableFile(path) as file:
        file.add(second)
        raise ValueError("elsewhere")
    assert pq.read_table(path).equals(first) and list(tmp_path.iterdir()) == [path]


@settings(deadline=None)
@given(PIECES.filter(any), st.integers(1, 600), st.randoms(use_true_random=False))
def test_a_spool_gives_rows_in_any_order(sizes, held, draw):
    """All rows or some of them, held or in files, come in the order asked for; no file has a name that stays."""
    pieces = pieces_of(sizes)
    order = draw.sample(range(sum(sizes)), draw.randint(1, sum(sizes)))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("overnight.data.spool.HELD", held)
        spool = Spool(Path(name) / "new")
        for piece in pieces:
            spool.add(piece)
        found = pa.concat_tables(spool.read(np.array(order)))
        assert found.equals(pa.concat_tables(pieces).take(order))
        assert not (Path(name) / "new").exists() or list((Path(name) / "new").iterdir()) == []
