"""The rules: how operators treat the axes of their tensors.

A rule is a generator over one call, a :class:`~vbpfx.rules.axes.Site`. Its docstring is the operator's formula. It yields
relations: which axes are the same channel by channel, which axes a weight produces or sums over, and which axes are opaque
and why.
"""

from vbpfx.rules import ops as ops  # importing any file of this package fills the operator table
