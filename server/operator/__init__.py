"""Commands of the operator of a SuperLink."""
