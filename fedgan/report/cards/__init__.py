"""Model cards and dataset cards, in Markdown and JSON.

The headings follow Model Cards (Mitchell et al. 2019, arXiv 1810.03993) and Datasheets for Datasets
(Gebru et al., arXiv 1803.09010). The facts are collected once as JSON; the Markdown renders them.
What no file of the run states is a blank that names who fills it, never an invented value.
"""

from fedgan.report.cards.comparison import write_comparison_cards
from fedgan.report.cards.writing import write_cards

__all__ = ["write_cards", "write_comparison_cards"]
