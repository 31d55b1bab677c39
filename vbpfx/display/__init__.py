"""Output for people: tables, formatted numbers, HTML and SVG templates, progress bars; and silencing other packages."""
