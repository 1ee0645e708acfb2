"""Code that several projects share."""
