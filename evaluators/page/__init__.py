"""The report as one HTML page that needs nothing else."""

from evaluators.page.build import write_page

__all__ = ["write_page"]
