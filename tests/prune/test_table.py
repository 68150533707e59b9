"""The table of strategies: what the documents and the command line say is what the code says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gap_export import prune
from gap_export.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pruners.md"


def test_the_page_shows_the_table() -> None:
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    expected = [
        f"| `{row.name}` | {row.summary} | {prune.needs(row)} | {'static or adaptive' if row.adaptive else 'static'} "
        f"| {'inside' if row.in_decoder else 'before'} the decoder | {prune.merging(row)} |"
        for row in prune.PRUNERS.values()
    ]
    assert [line for line in shown if line in expected] == expected
    assert len([line for line in shown if line.count("|") == 7]) == len(expected)


def test_models_shows_every_strategy() -> None:
    result = CliRunner().invoke(app, ["models", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)["pruners"]}
    assert tuple(rows) == prune.names()
    assert rows["visionzip"]["merges"]
    assert rows["prumerge"]["needs"] == ["attention"]
    assert all(name in CliRunner().invoke(app, ["models"]).stdout for name in prune.names())


@pytest.mark.parametrize("row", prune.PRUNERS.values(), ids=lambda row: row.name)
def test_every_row_leads_to_a_pruner_and_its_twin(row: prune.Pruner) -> None:
    assert callable(row.load().select)
    assert row.load().__name__.rpartition(".")[2] == row.name
    twins = ("scoring_queries", "choose") if row.in_decoder else (row.name,)
    twins += (f"{row.name}_adaptive",) if row.adaptive else ()
    assert all(callable(getattr(row.load_reference(), twin)) for twin in twins)
    assert row.merged < row.min_tokens
    assert row.merges or not row.merged
