"""report.html: one file that needs no network, made of sections and charts."""
