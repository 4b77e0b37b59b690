"""``tune report``: one page that shows a run, or compares several."""

from adapt_recipes.report.page import write_report

__all__ = ["write_report"]
