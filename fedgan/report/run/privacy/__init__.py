"""The privacy page: the verdict, the controls, what is guaranteed, what was found under three heads, what is not protected."""

from fedgan.report.run.privacy.section import SECTION

__all__ = ["SECTION"]
