"""From a comparison folder to one self-contained page.

`write_comparison(folder)` reads `comparison.json` and the sample grids and nothing else; what is not there
becomes a sentence on the page.
"""

from fedgan.report.comparison.report import write_comparison

__all__ = ["write_comparison"]
