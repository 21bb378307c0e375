"""From a document to the row of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.data.manifest import manifest_path
from megatron_ledom.data.provenance import _Sources, natural_range
from megatron_ledom.direction import Direction


def sources(prefix: Path, records: list[dict[str, Any]], skipped: list[tuple[int, int]] | None = None) -> _Sources:
    manifest_path(prefix).write_text(json.dumps({"sources": records}))
    if skipped is not None:
        lines = [json.dumps({"source": s, "row": r, "why": "empty"}) for s, r in skipped]
        Path(f"{prefix}.skipped.jsonl").write_text("\n".join(lines) + "\n")
    return _Sources(str(prefix))


def test_rows_count_what_became_no_document(tmp_path: Path) -> None:
    """a.jsonl: rows 1, 2, 5 and 9 of 10 skipped; b.jsonl holds nothing; c.jsonl is whole."""
    records = [
        {"path": "a.jsonl", "documents": 6, "rows": 10},
        {"path": "b.jsonl", "documents": 0, "rows": 2},
        {"path": "c.jsonl", "documents": 3, "rows": 3},
    ]
    found = sources(tmp_path / "x", records, [(0, 5), (0, 1), (0, 2), (0, 9), (1, 1), (1, 2)])
    rows = [found.locate(document) for document in range(9)]
    assert [row for path, row in rows if path == "a.jsonl"] == [3, 4, 6, 7, 8, 10]
    assert rows[6:] == [("c.jsonl", 1), ("c.jsonl", 2), ("c.jsonl", 3)]
    assert found.locate(9) == (None, None)


def test_rows_that_are_not_recorded_are_not_invented(tmp_path: Path) -> None:
    assert sources(tmp_path / "old", [{"path": "a", "documents": 2}]).locate(1) == ("a", None)
    lost = sources(tmp_path / "lost", [{"path": "a", "documents": 2, "rows": 5}], [(0, 1)])
    assert lost.locate(1) == ("a", None), "three rows are missing, one is listed"
    assert sources(tmp_path / "whole", [{"path": "a", "documents": 2, "rows": 2}]).locate(1) == ("a", 2)
    assert _Sources(str(tmp_path / "none")).locate(0) == (None, None)


@pytest.mark.parametrize(
    ("direction", "part", "expected"),
    [
        (Direction.FORWARD, (0, 4), (0, 4)),
        (Direction.FORWARD, (3, 10), (3, 9)),  # with the end-of-document id, which is no token of the text
        (Direction.REVERSE, (3, 10), (0, 6)),
        (Direction.REVERSE, (9, 10), (0, 0)),
    ],
)
def test_ranges_in_reading_order(direction: Direction, part: tuple[int, int], expected: tuple[int, int]) -> None:
    assert natural_range(*part, 9, direction) == expected
