"""Hard negatives that keep up with the model: mined anew while training goes on."""

from st_clp.refresh.callback import AnceCallback
from st_clp.refresh.history import plot_refreshes

__all__ = ["AnceCallback", "plot_refreshes"]
