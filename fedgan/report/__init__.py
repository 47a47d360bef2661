"""HTML reports and cards, made from the files of a run folder or comparison folder."""

from fedgan.report.run.report import write_report

__all__ = ["write_report"]
