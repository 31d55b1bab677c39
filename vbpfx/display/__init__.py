"""What people read: tables, figures in words, templates of HTML and SVG, progress bars. And silence for other packages."""
