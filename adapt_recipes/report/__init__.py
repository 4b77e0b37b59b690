"""``tune report``: one page that shows a run, or compares several."""

from adapt_recipes.report.page import write_report
from adapt_recipes.report.schedule import write_schedule

__all__ = ["write_report", "write_schedule"]
