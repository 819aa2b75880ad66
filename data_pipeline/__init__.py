"""Data sets of microstructure images and their stiffness: read, split, homogenise, synthesise."""
