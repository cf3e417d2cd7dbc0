"""The report as a self-contained HTML page."""

from evaluators.page.build import write_page

__all__ = ["write_page"]
