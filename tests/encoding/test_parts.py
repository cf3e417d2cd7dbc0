"""Parts of a store: what a worker of a cluster writes."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from st_clp.encoding.building import Builder
from st_clp.encoding.parts import PartEncoder, part_path
from st_clp.encoding.shards import ShardFiles
from st_clp.options import Encoding
from tests.distributed.words import SlowCorpus


def test_two_workers_at_the_same_part_do_not_spoil_it(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    """One may be taken for lost while only its network is gone."""
    torch.set_num_threads(1)
    corpus = SlowCorpus("words", {f"d{n}": f"river {n}" for n in range(2048)}, pause=0.01)
    encoding = Encoding()
    manifest: dict[str, Any] = Builder(tiny_model, corpus, "document", encoding)._manifest()
    written = []

    def write(model: SentenceTransformer, wait: float) -> None:
        time.sleep(wait)
        encoder = PartEncoder(model, corpus, "document", encoding, manifest, [])
        written.append(encoder(0, 2048, str(tmp_path)))

    threads = [threading.Thread(target=write, args=(copy.deepcopy(tiny_model), wait)) for wait in (0, 0.2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [2048, 2048]
    found = list(ShardFiles(part_path(tmp_path, 0), manifest).read())
    assert [(shard.rows, right) for shard, *_, right in found] == [(512, True)] * 4
    assert [doc_id for _, ids, *_ in found for doc_id in ids] == [f"d{n}" for n in range(2048)]
