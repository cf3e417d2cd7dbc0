"""``examples/queries_by_an_endpoint.py`` with a server on this machine."""

from __future__ import annotations

import runpy
from pathlib import Path

from sentence_transformers import SentenceTransformer

from st_clp.queries import QueryStore

from .conftest import Endpoint
from .test_store import write_documents

EXAMPLE = Path(__file__).parents[2] / "examples" / "queries_by_an_endpoint.py"


def test_the_server_writes_queries_once_and_the_model_trains_on_them(
    endpoint: Endpoint, tiny_model_path: Path, tmp_path: Path
) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    collection, output = write_documents(tmp_path / "collection", 60), tmp_path / "trained"
    arguments = (str(tiny_model_path), str(collection), str(output))
    main(*arguments, writer="tiny", base_url=endpoint.base_url)
    asked = len(endpoint.requests)
    assert asked == 4  # one row of four negatives
    with QueryStore(f"{output}.queries.sqlite") as store:
        store.open()
        assert store.spent()[0] == endpoint.tokens
    main(*arguments, writer="tiny", base_url=endpoint.base_url)
    assert len(endpoint.requests) == asked
    assert SentenceTransformer(str(output), device="cpu").encode("which river?").shape == (32,)
