"""The privacy section: audit verdict, controls, guarantee, evidence by criterion, limits."""

from fedgan.report.run.privacy.section import SECTION

__all__ = ["SECTION"]
