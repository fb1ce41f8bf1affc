"""Programs compiled for TPUs on a machine without one, to see whether they fit and how fast they would be."""
