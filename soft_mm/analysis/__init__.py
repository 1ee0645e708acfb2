"""Measuring and drawing."""
