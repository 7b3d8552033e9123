"""Converters from the archives of the papers' data sets to nnU-Net's raw layout, with the papers' splits.

``scripts/datasets/convert`` is the command; docs/datasets.md says what each data set is expected to be, and from where
that is known. The data themselves were not at hand when these were written.
"""
