"""How sentence-transformers' cached losses cut batches: private names of the library, used in this file only."""

from sentence_transformers.base.losses.gradcache import _create_minibatch as create_minibatch
from sentence_transformers.base.losses.gradcache import _get_batch_size as get_batch_size
from sentence_transformers.base.losses.gradcache import _minibatch_ranges as minibatch_ranges
from sentence_transformers.base.losses.gradcache import (
    _validate_mini_batch_num_tokens as validate_mini_batch_num_tokens,
)

__all__ = ["create_minibatch", "get_batch_size", "minibatch_ranges", "validate_mini_batch_num_tokens"]
