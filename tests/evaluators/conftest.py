"""A small collection with graded judgments that a tiny model neither solves nor fails."""

from __future__ import annotations

import itertools

import pytest

from st_clp import Collection

KINDS = "river lake mountain city bank school king queen".split()
COLOURS = "red blue green gold silver".split()


@pytest.fixture
def collection() -> Collection:
    """40 documents, 40 queries; a document of the asked kind and colour has grade 2, one of the kind alone 1."""
    triples = list(itertools.product(KINDS, COLOURS))
    documents = {f"d{n}": f"the {colour} {kind} of the north is old" for n, (kind, colour) in enumerate(triples)}
    queries = {f"q{n}": f"where is a {kind} , {colour} and big" for n, (kind, colour) in enumerate(triples)}
    judgments = {
        f"q{n}": {
            f"d{m}": 1 + (other_colour == colour) if other_kind == kind else 0
            for m, (other_kind, other_colour) in enumerate(triples)
            if other_kind == kind or other_colour == colour
        }
        for n, (kind, colour) in enumerate(triples)
    }
    return Collection.from_dict(documents, queries, judgments, name="miracl/xx/dev", language="en", split="dev")
