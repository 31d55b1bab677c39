"""A really trained small network and its data, small enough to ship with the package."""
