"""The tables in the pages are those of the committed results."""

import re

import numpy as np
import pytest

from experiments.tables import PAGES, TABLES, with_tables

NUMBER = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_results(page):
    """Word for word but for the decimals: `make quickstart` measures anew, on this machine, what they were made from.

    Bytes on disk and the order of float sums may differ a little between runs and machines.
    """
    text = page.read_text(encoding="utf-8")
    made = with_tables(text)
    assert NUMBER.sub("#", made) == NUMBER.sub("#", text)
    np.testing.assert_allclose(*([float(n) for n in NUMBER.findall(side)] for side in (made, text)), rtol=0.05)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_stands_in_a_page(name):
    assert any(f"<!-- table: {name} -->" in page.read_text(encoding="utf-8") for page in PAGES)


def test_unknown_marker_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        with_tables("<!-- table: nothing -->\n<!-- end -->")
