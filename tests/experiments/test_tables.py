"""The tables in README.md are those of the committed results."""

import pytest

from experiments.tables import ROOT, TABLES, with_tables

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_shows_the_committed_results():
    assert with_tables(README) == README


@pytest.mark.parametrize("name", TABLES)
def test_every_table_stands_in_the_readme(name):
    assert f"<!-- table: {name} -->" in README


def test_unknown_marker_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        with_tables("<!-- table: nothing -->\n<!-- end -->")
