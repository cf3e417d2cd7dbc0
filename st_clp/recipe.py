"""A whole run from Python: ``from st_clp.recipe import run``."""

from st_clp.run.stages import forecast_run, run

__all__ = ["forecast_run", "run"]
