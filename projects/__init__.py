"""Worked examples that use soft_mm, each with its code, configs and tests."""
