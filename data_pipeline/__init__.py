"""Data sets of microstructure images and their stiffness: reading, splitting, homogenising, synthesising."""
