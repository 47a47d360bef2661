"""Feature extractors, one network per module; `fedgan.evaluation.features` selects one."""
