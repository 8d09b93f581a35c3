"""Triton's forms of some operations: one file per operation, named as the plain form that is the truth.

Nothing outside `ops/` imports from here: an operation's own module does so where
:func:`lightning_dsv3.ops.backends.chosen` answers ``triton``.
"""
