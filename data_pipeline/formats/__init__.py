"""Files that hold images or labels: one module a format, each with the limits that keep a hostile file harmless."""
