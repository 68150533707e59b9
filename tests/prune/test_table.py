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
        f"| {row.where} | {prune.merging(row)} |"
        for row in prune.STRATEGIES
    ]
    assert [line for line in shown if line in expected] == expected
    assert len([line for line in shown if line.count("|") == 7]) == len(expected)


def test_models_shows_every_strategy() -> None:
    result = CliRunner().invoke(app, ["models", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)["pruners"]}
    assert tuple(rows) == prune.names()
    assert rows["visionzip"]["merges"]
    assert rows["prumerge"]["needs"] == ["class_token", "following_layer"]
    assert all(name in CliRunner().invoke(app, ["models"]).stdout for name in prune.names())


@pytest.mark.parametrize("row", prune.STRATEGIES, ids=lambda row: row.name)
def test_every_row_leads_to_a_strategy(row: prune.Strategy) -> None:
    assert callable(prune.implementation(row).select)
    assert row.merged < row.min_tokens
    assert row.merges or not row.merged
