"""The former name of :mod:`st_clp.run.recipe`."""

from st_clp.run.recipe import forecast_run, run

__all__ = ["forecast_run", "run"]
