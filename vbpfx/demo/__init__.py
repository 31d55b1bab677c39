"""The demo: a small trained network and its data, which ship with the package."""
