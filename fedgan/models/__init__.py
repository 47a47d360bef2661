"""Networks: one folder per generator family, and the classifiers."""
