"""The former name of :mod:`st_clp.queries`."""

from st_clp.queries import *  # noqa: F403
from st_clp.queries import SourceCost as SourceOutlook  # noqa: F401
from st_clp.queries import __all__  # noqa: F401
from st_clp.queries import estimate_cost as outlook  # noqa: F401
