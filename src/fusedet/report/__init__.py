"""The page of a run: what a detector does well, where it fails, and what that costs."""

from fusedet.report.page import write_page

__all__ = ["write_page"]
