"""Hard negatives that keep up with the model: mined anew while training goes on."""

from st_clp.refresh.account import plot_refreshes
from st_clp.refresh.callback import AnceCallback

__all__ = ["AnceCallback", "plot_refreshes"]
