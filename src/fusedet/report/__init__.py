"""The page of a run: what a detector does well, where it fails, and what that costs."""

from fusedet.report.page import write_report_page

__all__ = ["write_report_page"]
