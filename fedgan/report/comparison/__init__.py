"""Report of a comparison folder: one self-contained HTML file.

`write_comparison_report(folder)` reads only `comparison.json`, `config.toml` and the sample grids.
Missing content becomes a sentence in the report.
"""

from fedgan.report.comparison.report import write_comparison_report

__all__ = ["write_comparison_report"]
