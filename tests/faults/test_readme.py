"""The table of faults names tests, or files of tests, that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_row_of_the_table_names_a_test_that_exists() -> None:
    rows = [
        line for line in (TESTS / "faults/README.md").read_text("utf-8").splitlines() if line.startswith("| ")
    ]
    assert len(rows) > 30
    for row in rows[1:]:
        named = re.findall(r"`([\w/]+\.py)?(?:::(test_\w+))?`", row.replace(r"\|", ""))
        assert any(named), row
        file = ""
        for path, test in named:
            file = path or file
            text = (TESTS / file).read_text("utf-8") if path or test else ""
            assert f"def {test}(" in text or not test, (file, test)
