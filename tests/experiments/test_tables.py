"""The tables in README.md are those of the committed results."""

import re

import numpy as np
import pytest

from experiments.tables import ROOT, TABLES, with_tables

README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")


def test_readme_shows_the_committed_results():
    """Word for word but for the decimals: `make quickstart` measures anew, on this machine, what they were made from.

    Bytes on disk and the order of float sums may differ a little between runs and machines.
    """
    made = with_tables(README)
    assert NUMBER.sub("#", made) == NUMBER.sub("#", README)
    np.testing.assert_allclose(*([float(n) for n in NUMBER.findall(text)] for text in (made, README)), rtol=0.05)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_stands_in_the_readme(name):
    assert f"<!-- table: {name} -->" in README


def test_unknown_marker_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        with_tables("<!-- table: nothing -->\n<!-- end -->")
