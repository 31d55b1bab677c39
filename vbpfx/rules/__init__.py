"""The rules: how operators treat the axes of their tensors.

A rule is a generator over one call, a :class:`~vbpfx.rules.axes.Site`. Its docstring is the operator's formula; it yields
which axes run channel by channel into which, which a weight makes or sums over, and which are opaque and why.
"""

from vbpfx.rules import ops as ops  # whoever imports a file of this package finds the operator table filled
