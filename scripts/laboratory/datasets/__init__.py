"""Converters from the archives of the papers' data sets to nnU-Net's raw layout, with the papers' splits.

``python -m laboratory.datasets --help``; each data set has a module that says what it expects, and from where
that is known. The data themselves were not at hand when these were written.
"""
