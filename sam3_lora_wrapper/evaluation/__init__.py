"""What is measured of a model, and how a run shows it."""
