"""The same training with one thing changed at a time, over seeds and languages, with tests of the differences."""

from st_clp.run.ablation.study import Ablation, ablate
from st_clp.run.ablation.table import AblationTable
from st_clp.run.ablation.variants import BASE, Variant, default_variants, read_variants

__all__ = ["BASE", "Ablation", "AblationTable", "Variant", "ablate", "default_variants", "read_variants"]
