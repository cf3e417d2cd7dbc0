"""The list of changes to try the tests with is of the code as it is."""

from __future__ import annotations

import pytest

from tools.mutate import ROOT, Mutation, read_mutations


@pytest.mark.parametrize("mutation", read_mutations(ROOT / "tools" / "mutations.txt"), ids=lambda one: str(one.number))
def test_each_change_is_of_a_line_that_stands_once_in_its_file(mutation: Mutation) -> None:
    lines = (ROOT / mutation.file).read_text(encoding="utf-8").split("\n")
    assert [line.strip() for line in lines].count(mutation.old) == 1
    assert mutation.old != mutation.new
