"""Cards: what a stranger has to know of a model or a data set before using it, in Markdown and in JSON.

The headings follow Model Cards (Mitchell et al. 2019, arXiv 1810.03993) and Datasheets for Datasets (Gebru et al.,
arXiv 1803.09010). The facts are collected once, as plain JSON; the Markdown is a rendering of the same facts.
What no file of the run tells is a blank that says who has to fill it, never an invented value.
"""

from fedgan.report.cards.comparison import write_comparison_cards
from fedgan.report.cards.writing import write_cards

__all__ = ["write_cards", "write_comparison_cards"]
