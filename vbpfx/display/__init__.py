"""What people read: tables, figures in words, and templates of HTML and SVG."""
