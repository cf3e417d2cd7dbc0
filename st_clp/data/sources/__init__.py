"""Where collections come from. Each module registers itself, and a new one is imported here.

The user's own files come first: a folder with a collection in it wins over other sources of the same name.
"""

from st_clp.data.sources import beir_folder, training_rows, embedded, irds  # isort: skip

__all__ = ["beir_folder", "embedded", "irds", "training_rows"]
