"""From a run folder to one self-contained page.

`write_report(run)` reads the files of the run folder and nothing else; a file that is not there yet
becomes a sentence on the page.
"""

from fedgan.report.run.report import write_report

__all__ = ["write_report"]
